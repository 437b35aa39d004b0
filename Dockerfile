# NVIDIA's image includes torch, Transformer Engine, apex and flash-attention, built for each other. The build keeps them.
# Build: docker build -t offline-align .
# Run:   docker run --gpus all --ipc=host -v "$PWD":/workspace offline-align sft run.dir=runs/sft ...
# Slurm: enroot import -o offline-align.sqsh dockerd://offline-align (docs/cluster.md)
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3

FROM python:3.12.12-slim AS wheel
WORKDIR /source
COPY . .
# The locked versions of all packages that the image lacks. --prune torch also removes torch's CUDA libraries.
RUN pip install --no-cache-dir uv==0.13.9 build==1.3.0 hatchling==1.27.0 \
    && python -m build --wheel --no-isolation --outdir /wheel \
    && uv export --frozen --no-dev --no-emit-project --no-hashes --prune torch --prune numpy \
        --output-file /wheel/requirements.txt

FROM ${BASE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Fail if the installation changes one of the image's own packages.
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    kept='^(torch|triton|numpy|transformer[-_]engine|apex|flash[-_]attn)([^a-z]|$)' \
    && python -m pip freeze | grep -iE "$kept" > /tmp/before \
    && PIP_CONSTRAINT='' python -m pip install --no-cache-dir --no-deps -r /wheel/requirements.txt /wheel/*.whl \
    && python -m pip freeze | grep -iE "$kept" | diff /tmp/before - \
    && rm /tmp/before

# A numeric user id lets Kubernetes and enroot see that the user is not root.
RUN useradd --create-home --uid 10001 align
USER 10001
WORKDIR /workspace
ENTRYPOINT ["offline-align"]
