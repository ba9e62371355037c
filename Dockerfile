# syntax=docker/dockerfile:1
# The server with the bundle in model/default, on CPU unless TORCH_INDEX says otherwise:
#   docker build -t offramp .
#   docker build -t offramp:cuda --build-arg TORCH_INDEX= --build-arg PACKAGES="gcc libc6-dev" .
ARG PYTHON=3.12.11-slim-bookworm

FROM python:${PYTHON} AS build
# Which build of torch: the same variable as in the Makefile, empty for the CUDA build.
ARG TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
# Packages beyond the lock, as those of the extra "tracing" in pyproject.toml.
ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/offramp/.venv
WORKDIR /opt/offramp
COPY pyproject.toml requirements.lock ./
# Torch is not in the lock, since its CPU and CUDA builds differ in hash; all it needs of Python is.
RUN .venv/bin/pip install --require-hashes -r requirements.lock \
    && .venv/bin/pip install ${TORCH_INDEX} \
        "$(sed -n 's/^ *"\(torch==[0-9.]*\)",$/\1/p' pyproject.toml)" \
    && if [ -n "${EXTRAS}" ]; then .venv/bin/pip install ${EXTRAS}; fi \
    && .venv/bin/pip uninstall -y pip
COPY model model
COPY server server
COPY deploy/__init__.py deploy/files.py deploy/options.py deploy/
COPY deploy/loadtest deploy/loadtest
RUN .venv/bin/python -m compileall -q model server deploy

FROM python:${PYTHON}
# Of Debian: a card's kernels are compiled when the server starts, which takes a C compiler.
ARG PACKAGES=""
RUN if [ -n "${PACKAGES}" ]; then apt-get update \
    && apt-get install -y --no-install-recommends ${PACKAGES} && rm -rf /var/lib/apt/lists/*; fi
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/cache/offramp offramp \
    && install -d -o offramp -g offramp /var/cache/offramp
COPY --from=build /opt/offramp /opt/offramp
WORKDIR /opt/offramp
# The one place that is written to, beside /tmp; what has been compiled is kept there.
ENV PATH=/opt/offramp/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/offramp \
    XDG_CACHE_HOME=/var/cache/offramp \
    OFFRAMP_HOST=0.0.0.0 \
    OFFRAMP_PORT=8000
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --start-interval=1s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"OFFRAMP_PORT\"]}/readyz', timeout=4)"]
ENTRYPOINT ["python", "-m", "server"]
