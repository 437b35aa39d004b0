# NVIDIA's image brings torch, Transformer Engine and apex, built for each other: none of them is replaced.
# Build: docker build -t offline-align .
# Run:   docker run --gpus all --ipc=host -v "$PWD":/workspace offline-align sft run.dir=runs/sft ...
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3

FROM python:3.12-slim AS wheel
RUN pip install --no-cache-dir uv==0.13.9 build==1.3.0 hatchling==1.27.0
WORKDIR /source
COPY . .
RUN python -m build --wheel --no-isolation --outdir /wheel
# The locked versions of everything that the image lacks; pruning torch also leaves out its CUDA libraries.
RUN uv export --frozen --no-dev --no-emit-project --no-hashes --prune torch --prune numpy \
    --output-file /wheel/requirements.txt

FROM ${BASE}
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    python -m pip freeze | grep -iE '^(torch|transformer[-_]engine|apex|numpy)\b' > /tmp/before \
    && PIP_CONSTRAINT= python -m pip install --no-cache-dir --no-deps -r /wheel/requirements.txt /wheel/*.whl \
    && python -m pip freeze | grep -iE '^(torch|transformer[-_]engine|apex|numpy)\b' | diff /tmp/before - \
    && rm /tmp/before

RUN useradd --create-home --uid 10001 align
USER align
WORKDIR /workspace
ENTRYPOINT ["offline-align"]
