# NVIDIA's image brings torch, Transformer Engine, apex and flash-attention, built for each other: none is replaced.
# Build: docker build -t offline-align .
# Run:   docker run --gpus all --ipc=host -v "$PWD":/workspace offline-align sft run.dir=runs/sft ...
# Slurm: enroot import -o offline-align.sqsh dockerd://offline-align (docs/cluster.md)
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3

FROM python:3.12.12-slim AS wheel
WORKDIR /source
COPY . .
# The locked versions of everything that the image lacks; pruning torch also leaves out its CUDA libraries.
RUN pip install --no-cache-dir uv==0.13.9 build==1.3.0 hatchling==1.27.0 \
    && python -m build --wheel --no-isolation --outdir /wheel \
    && uv export --frozen --no-dev --no-emit-project --no-hashes --prune torch --prune numpy \
        --output-file /wheel/requirements.txt

FROM ${BASE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# What the image came with, before and after, must be the same.
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    kept='^(torch|triton|numpy|transformer[-_]engine|apex|flash[-_]attn)([^a-z]|$)' \
    && python -m pip freeze | grep -iE "$kept" > /tmp/before \
    && PIP_CONSTRAINT='' python -m pip install --no-cache-dir --no-deps -r /wheel/requirements.txt /wheel/*.whl \
    && python -m pip freeze | grep -iE "$kept" | diff /tmp/before - \
    && rm /tmp/before

# By number, so that Kubernetes and enroot know that it is not root.
RUN useradd --create-home --uid 10001 align
USER 10001
WORKDIR /workspace
ENTRYPOINT ["offline-align"]
