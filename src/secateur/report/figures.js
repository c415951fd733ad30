// Unpacks plotly, draws the figures of the page in its colors, and pins runs side by side. No request, no storage.
(() => {
  "use strict";
  const nonce = document.currentScript.nonce;
  const byId = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(byId(id).textContent);

  const unpack = async () => {
    const bytes = Uint8Array.from(atob(byId("plotly-packed").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.nonce = nonce;
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };

  // Words such as @after are the colors of the style sheet.
  const colored = (thing, style) => {
    if (typeof thing === "string") return thing[0] === "@" ? style.getPropertyValue("--" + thing.slice(1)).trim() || thing : thing;
    if (Array.isArray(thing)) return thing.map((each) => colored(each, style));
    if (thing && typeof thing === "object") return Object.fromEntries(Object.entries(thing).map(([k, v]) => [k, colored(v, style)]));
    return thing;
  };

  const narrow = () => window.innerWidth < 640;

  const themed = (layout, box) => {
    const axis = { gridcolor: "@line", linecolor: "@line", zerolinecolor: "@soft", automargin: true };
    const full = {
      ...layout,
      autosize: true,
      height: Number(box.dataset.height) || 340,
      margin: { l: narrow() ? 44 : 60, r: narrow() ? 8 : 24, t: 30, b: 48 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: "@ink", size: narrow() ? 11 : 13, family: "system-ui, sans-serif" },
      hoverlabel: { bgcolor: "@card", bordercolor: "@soft", font: { color: "@ink" }, align: "left" },
    };
    for (const name of ["xaxis", "yaxis", "yaxis2"]) {
      if (layout[name]) full[name] = { ...axis, ...layout[name], fixedrange: narrow() };
    }
    return full;
  };

  const options = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { format: "svg" },
  };
  const figures = new Map();

  const draw = (box) => {
    const figure = figures.get(box);
    const style = getComputedStyle(document.documentElement);
    // A copy: plotly writes into what it is given.
    const shown = structuredClone(figure);
    return window.Plotly.react(box, colored(shown.data, style), colored(themed(shown.layout, box), style), options);
  };
  const drawAll = () => Promise.all([...figures.keys()].map(draw));

  // ---- The comparison: which cost, and pinned runs ----

  const element = (name, text, cls) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (cls) made.className = cls;
    return made;
  };

  const card = (run) => {
    const made = element("article", undefined, "pinned");
    made.append(element("h3", run.name));
    const list = element("dl");
    for (const [label, value] of run.facts) list.append(element("dt", label), element("dd", value));
    made.append(list);
    const widths = element("ul", undefined, "pinned-widths");
    for (const [name, before, after] of run.widths) {
      const row = element("li");
      row.append(element("span", name, "name"), element("span", `${after} of ${before}`));
      const bar = element("i");
      bar.style.setProperty("--w", String((100 * after) / Math.max(before, 1)));
      row.append(bar);
      widths.append(row);
    }
    made.append(widths);
    return made;
  };

  const comparison = () => {
    if (!byId("runs-data")) return;
    const runs = read("runs-data");
    const place = byId("pins");
    let pins = [];
    const show = () => {
      place.replaceChildren(...pins.map((at) => card(runs[at])));
      for (const button of document.querySelectorAll("button[data-pin]")) {
        const on = pins.includes(Number(button.dataset.pin));
        button.setAttribute("aria-pressed", String(on));
        button.textContent = on ? "Unpin" : "Pin";
      }
    };
    const pin = (at) => {
      pins = pins.includes(at) ? pins.filter((each) => each !== at) : [...pins.slice(-1), at];
      show();
    };
    for (const button of document.querySelectorAll("button[data-pin]")) {
      button.hidden = false;
      button.addEventListener("click", () => pin(Number(button.dataset.pin)));
    }
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && pins.length) {
        pins = [];
        show();
      }
    });
    const box = byId("figure-pareto");
    if (!box) return;
    box.on("plotly_click", (event) => {
      const at = event.points[0].customdata;
      if (at !== undefined && at !== null) pin(Number(at));
    });
    const figure = figures.get(box);
    const { switch: costs, front } = figure.layout.meta;
    for (const choice of document.querySelectorAll("input[name=cost]")) {
      choice.addEventListener("change", () => {
        const cost = costs[Number(choice.value)];
        figure.data.forEach((trace, at) => {
          trace.x = cost.x[at];
          if (at === front) trace.y = cost.front;
        });
        figure.layout.xaxis.title.text = cost.title;
        draw(box);
      });
    }
  };

  const start = async () => {
    await unpack();
    for (const box of document.querySelectorAll(".figure")) {
      figures.set(box, read(box.id + "-data"));
      box.replaceChildren();
    }
    await drawAll();
    comparison();
    document.documentElement.dataset.drawn = String(Math.round(performance.now()));
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    window.matchMedia("print").addEventListener("change", drawAll);
    window.addEventListener("beforeprint", drawAll);
  };

  start().catch((error) => {
    for (const box of document.querySelectorAll(".figure")) {
      box.textContent = "This browser cannot draw the figure (" + error.message + "); the table has its numbers.";
    }
  });
})();
