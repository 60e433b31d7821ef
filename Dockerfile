# syntax=docker/dockerfile:1
# docs/install.md: how to build it, which versions go together, and why. IMAGE is one of the stages below:
#   cpu            the trainer without CUDA, which runs the quickstart
#   trainer        on NVIDIA's PyTorch image: its torch, Transformer Engine and Apex, and Megatron-Core
#   trainer-vllm, trainer-sglang    that, and an engine in an environment of its own below /opt
ARG IMAGE=trainer-vllm
ARG CPU_IMAGE=python:3.11-slim
ARG TRAINER_IMAGE=nvidia/pytorch:26.01-py3

# Megatron-Core's version stands in pyproject.toml, and so does the torch of the CPU image.
FROM ${CPU_IMAGE} AS cpu
RUN python3 -m venv /opt/tempo
ENV PATH=/opt/tempo/bin:${PATH} OMP_NUM_THREADS=1
WORKDIR /opt/megatron-tempo
COPY docker/requirements.py docker/
COPY pyproject.toml ./
# Where to get torch without CUDA from, if not from PyPI, whose torch brings CUDA along. pip reads these by itself.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip \
    python docker/requirements.py --only torch > /tmp/torch.txt \
    && pip install -r /tmp/torch.txt && rm /tmp/torch.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python docker/requirements.py --without torch > /tmp/others.txt \
    && pip install -r /tmp/others.txt && rm /tmp/others.txt

# torch stays the image's: Transformer Engine and Apex are compiled against it. What would replace it, the image's own
# constraints of pip refuse; check_versions.py looks again.
FROM ${TRAINER_IMAGE} AS trainer
ARG TORCH=2.10.0
ARG TRANSFORMER_ENGINE=2.11
# The image allows TF32 in fp32 products. megatron_tempo/models/device.py says why not here.
ENV TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0 CUBLAS_WORKSPACE_CONFIG=:4096:8
WORKDIR /opt/megatron-tempo
COPY docker/requirements.py docker/check_versions.py docker/
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python docker/requirements.py --without torch > /tmp/others.txt \
    && pip install -r /tmp/others.txt && rm /tmp/others.txt \
    && python docker/check_versions.py --torch "${TORCH}" --transformer-engine "${TRANSFORMER_ENGINE}"

# An engine wants another torch than the image's, so it sees nothing of the image but its Python and its compilers.
FROM ${TRAINER_IMAGE} AS engine
ARG VIRTUALENV=21.15.11
RUN --mount=type=cache,target=/root/.cache/pip pip install "virtualenv==${VIRTUALENV}"

FROM engine AS vllm
ARG VLLM=0.32.0
RUN --mount=type=cache,target=/root/.cache/pip \
    virtualenv /opt/vllm && env -u PIP_CONSTRAINT -u LD_LIBRARY_PATH /opt/vllm/bin/pip install "vllm==${VLLM}"
COPY docker/engine-python /opt/vllm/bin/

FROM engine AS sglang
ARG SGLANG=0.5.23
RUN --mount=type=cache,target=/root/.cache/pip \
    virtualenv /opt/sglang && env -u PIP_CONSTRAINT -u LD_LIBRARY_PATH /opt/sglang/bin/pip install "sglang==${SGLANG}"
COPY docker/engine-python /opt/sglang/bin/

# NCCL refuses a group whose members have different versions of it, and weights go from the trainer to the engine by
# such a group. A newer NCCL keeps the interface of an older one, and the engine's torch is the newer, so its NCCL serves
# both; check_versions.py looks whether it does. (LD_LIBRARY_PATH would not do for a torch with an RPATH to its own.)
FROM trainer AS trainer-vllm
COPY --from=vllm /opt/vllm /opt/vllm
ENV LD_PRELOAD=/opt/vllm/lib/python3.12/site-packages/nvidia/nccl/lib/libnccl.so.2
RUN python docker/check_versions.py --engine /opt/vllm/bin/engine-python

FROM trainer AS trainer-sglang
COPY --from=sglang /opt/sglang /opt/sglang
ENV LD_PRELOAD=/opt/sglang/lib/python3.12/site-packages/nvidia/nccl/lib/libnccl.so.2
RUN python docker/check_versions.py --engine /opt/sglang/bin/engine-python

FROM ${IMAGE} AS image
ARG USER_ID=1000
ARG GROUP_ID=1000
# The base may have given these numbers to a user of its own.
RUN groupadd --non-unique --gid "${GROUP_ID}" tempo \
    && useradd --non-unique --uid "${USER_ID}" --gid tempo --create-home tempo
WORKDIR /opt/megatron-tempo
COPY pyproject.toml setup.py README.md LICENSE ./
COPY configs configs
COPY examples examples
COPY launch launch
COPY tools tools
COPY megatron_tempo megatron_tempo
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --editable .
USER ${USER_ID}:${GROUP_ID}
ENV HOME=/home/tempo
WORKDIR /home/tempo
ENTRYPOINT ["megatron-tempo"]
CMD ["--help"]
