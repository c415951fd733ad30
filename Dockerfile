# Secateur for CPUs: docker build -t secateur . && docker run --rm -v "$PWD:/work" secateur compress --help
FROM python:3.11-slim

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY requirements ./requirements
COPY src ./src
# torch without CUDA, which would take several gigabytes.
RUN sed -E '/^(torch|torchvision)==/ s/ *;.*//' requirements/pinned.txt | grep -E '^(torch|torchvision)==' > /tmp/torch.txt \
    && pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu -r /tmp/torch.txt \
    && pip install --no-cache-dir --constraint requirements/pinned.txt '.[report,demo]' \
    && rm -rf /src/build /tmp/torch.txt

RUN useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["secateur"]
CMD ["--help"]
