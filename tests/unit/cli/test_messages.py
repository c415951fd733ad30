"""Messages of the command line speak of flags; and all that is wrong is said at once."""

import itertools
import string

import pytest
from command_line import Result, outcome
from hypothesis import given
from hypothesis import strategies as st

from secateur.cli import main
from secateur.cli.app import app, export_command
from secateur.cli.compress import compress_command
from secateur.cli.distill import distill_command
from secateur.cli.inspect import bench_command, evaluate_command, inspect_command, verify_command
from secateur.cli.messages import Checks, flags_of, in_flags
from secateur.cli.train import train_command
from secateur.errors import BudgetError, DataError, SecateurError

COMMANDS = (
    compress_command, distill_command, train_command, inspect_command, evaluate_command, verify_command, bench_command,
    export_command,
)  # fmt: skip
FLAGS = flags_of(compress_command)


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("`image_size` must be one. Pass image_size=224.", "`--image-size` must be one. Pass --image-size 224."),
        ("Pass `limit` or a smaller `image_size`.", "Pass `--limit` or a smaller `--image-size`."),
        ("`learning_rate` must be positive", "`--lr` must be positive"),
        ("`ema_decay` must be in [0, 1); got 2.", "`--ema` must be in [0, 1); got 2."),
        (
            "Lower min_width (now 8), divisor (now 4) or min_kept_fraction (now 0.25); on the command line "
            "--min-width, --divisor, --min-kept.",
            "Lower --min-width (now 8), --divisor (now 4) or --min-kept (now 0.25).",
        ),
        ("Let blocks go too (--remove-blocks; in Python: RemoveBlocks).", "Let blocks go too (--remove-blocks)."),
        ("keep them (without --from-scratch; in Python: init=KeepWeights()).", "keep them (without --from-scratch)."),
        ("lists the axes (in Python: graph.axes).", "lists the axes."),
        ("Pass trust_source=True (--trust-source) if", "Pass --trust-source if"),
        ("go on: --skip-bad-images (skip_bad_images=True)", "go on: --skip-bad-images"),
        ("Set kd_weight=0.", "Set --kd-weight 0."),
    ],
)  # fmt: skip
def test_arguments_become_flags(python: str, words: str) -> None:
    assert in_flags(python, FLAGS) == words
    assert in_flags(words, FLAGS) == words


@pytest.mark.parametrize(
    "text",
    [
        "Objective(kd_weight=0, label_weight=0, terms=(Term(...),)) and SearchSpace(min_width=3)",
        "/data/batch_size/image_size.png must be an image; got 'min_width'",
        "layer.batch_size and batch_size.weight and `labels` must be class indices",
        "ModuleNotFoundError: No module named 'batch_size'",
        "a seed, a budget and the model of the data",
    ],
)
def test_code_paths_and_plain_words_stay(text: str) -> None:
    assert in_flags(text, FLAGS) == text


@given(st.text(string.printable, max_size=200))
def test_any_text_ends_and_nothing_changes_without_flags(text: str) -> None:
    in_flags(text, FLAGS)
    plain = text.replace("(", "").replace("--", "").replace("; in Python", "").replace("; on the command", "")
    assert in_flags(plain, {}) == plain


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_flag_that_a_message_can_name_is_one_of_the_command(command) -> None:
    known = set(
        itertools.chain.from_iterable(argument.names for argument in app[_name(command)].assemble_argument_collection())
    )
    found = flags_of(command)
    assert set(found.values()) <= known
    assert found["model"] == "--model" if "--model" in known else "model" not in found


def _name(command) -> str:
    return command.__name__.removesuffix("_command")


def _run(*words: object) -> Result:
    return outcome(main, *words)


def _said(found: Result) -> str:
    assert found.exit_code == 2, found.output
    assert "Traceback" not in found.output
    return found.stderr


def test_all_that_is_wrong_is_said_at_once(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    found = _run(
        *("compress", "--model", "cifar_resnet21", "--weights", tmp_path / "absent.safetensors", "--data", "nowhere"),
        *("--budget", "macs=fifty%", "--out", tmp_path / "file", "--export", "onnxx", "--mean", "red"),
        *(
            "--strategy",
            "best",
            "--target-device",
            "toaster",
            "--target",
            "torch",
            "--ema",
            "2",
            "--resume",
            "--restart",
        ),
    )
    lines = _said(found).splitlines()
    assert lines[0] == "Error: 11 things cannot be used:"
    told = "\n".join(lines[1:])
    for word in (
        "`--model` must be a known name", "`--weights` must be a file", "`--mean` must be numbers", "`--data` must be",
        "`--export` must name", "`--out` must be a folder", "'fifty%'", "`--strategy` must be one of",
        "`--target-device` must be", "`--ema` must be in [0, 1)", "`--resume` continues",
    ):  # fmt: skip
        assert word in told, told
    assert len(lines) == 12


def test_teacher_and_student_are_told_apart(tmp_path) -> None:
    found = _run(
        *("distill", "--teacher", "cifar_resnet21", "--teacher-weights", "a.safetensors", "--student", "nothing"),
        *("--student-weights", "b.safetensors", "--data", "digits", "--out", tmp_path / "out", "--loss", "kdd"),
    )
    told = _said(found)
    for word in ("`--teacher` must", "`--teacher-weights` must", "`--student` must", "`--student-weights` must", "kdd"):
        assert word in told, told


@pytest.mark.parametrize(
    "words",
    [
        ("--image-size", 0), ("--validation-fraction", 2), ("--limit", 10**8), ("--lr", 0), ("--batch-size", 0),
        ("--ema", 1.5), ("--accumulate", 999), ("--warmup", 3), ("--erase", 7), ("--mixup", -1), ("--temperature", 0),
        ("--label-smoothing", 1), ("--min-kept", 2), ("--axis-divisor", "x=0"), ("--precision", "8"),
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_flag_out_of_range_is_named_as_a_flag(words: tuple[str, object], tmp_path) -> None:
    found = _run(
        *("compress", "--model", "digits_resnet", "--data", "digits", "--budget", "macs=50%"),
        *("--out", tmp_path / "out", *words),
    )
    told = _said(found)
    assert str(words[0]) in told, told
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_met_before_anything_is_loaded(tmp_path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "settings.json").write_text("{}")
    found = _run(
        "compress", "--model", "digits_resnet", "--data", tmp_path, "--budget", "macs=50%", "--out", tmp_path / "out"
    )
    told = _said(found)
    assert "`--out` must have no unfinished run beside it" in told
    assert "train" not in told  # the data, which is none, was not looked at


def test_one_error_is_said_as_it_is() -> None:
    checks = Checks()
    checks.add(lambda: 3)
    number = checks.add(lambda: int("3"))
    checks.settle()
    assert number() == 3

    def fail() -> int:
        raise BudgetError("`budget` must be one.")

    wrong = checks.add(fail)
    checks.add(lambda: wrong() + 1)  # What depends on it is not said again.
    with pytest.raises(BudgetError, match=r"^`budget` must be one\.$"):
        checks.settle()

    def fail_too() -> int:
        raise DataError("`data` must be some.")

    checks.add(fail_too)
    with pytest.raises(
        SecateurError, match=r"^2 things cannot be used:\n- `budget` must be one\.\n- `data` must be some\.$"
    ):
        checks.settle()


def test_bugs_are_not_collected() -> None:
    checks = Checks()
    with pytest.raises(ZeroDivisionError):
        checks.add(lambda: 1 // 0)
