# The environment of requirements.txt and the code, for machines with Docker.
#
#   ./run.sh build         # or: make build-image
#   ./run.sh make smoke
#
# `base` and not `runtime` or `devel`: torch's wheels bring their own CUDA libraries (12.6). 12.8.1-base-ubuntu24.04 by
# its digest: a tag can be moved.
FROM nvidia/cuda@sha256:133c78a0575303be34164d0b90137a042172bdf60696af01a3c424ab402d86e2

# A C++ compiler and Python's headers, because torch.compile and Triton build launchers at run time. Versions are
# Ubuntu's of the day: its archive drops the older ones, so that pins would break the build, not repeat it.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends ca-certificates g++ gcc make python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/*

# The base image refuses to start under drivers older than its own CUDA 12.8, such as 560.94; torch asks for 12.6 only.
ENV NVIDIA_DISABLE_REQUIRE=1

# /app/* are there for mounts; whoever runs the image with another --user mounts folders of their own.
RUN useradd --create-home --uid 10001 ouro && \
    install -d -o ouro -g ouro /app /app/output /app/results /app/cache /scratch/huggingface
WORKDIR /app

# The packages (6 GB) are a layer of their own, which a change of the code does not touch.
COPY requirements.txt ./
COPY tools/env.sh tools/
RUN --mount=type=cache,target=/root/.cache UV_LINK_MODE=copy tools/env.sh python3

COPY . .
ENV PATH=/app/.venv/bin:$PATH HF_HOME=/scratch/huggingface PYTHONUNBUFFERED=1
# PyTorch asks for the name of the user, and a --user that the image does not know has none.
ENV USER=ouro
ARG COMMIT=unknown
RUN echo "$COMMIT" >COMMIT
LABEL org.opencontainers.image.title="ouro-thai" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="$COMMIT"
USER 10001
CMD ["make"]
