# FedMed with all it needs at run time, for the coordinator, the hospitals and their rehearsal on one machine: docs/deployment.md.
#
#   docker build -t fedmed:0.1.0 .
#
# PIP_OPTIONS are further options for pip, such as an index with another build of torch (for CPUs only, or for the CUDA version of
# your driver). They can be read in the history of the image: no passwords.

FROM python:3.11-slim AS build
ARG PIP_OPTIONS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/fedmed

# What FedMed stands on, in a layer of its own: it changes less often than the sources.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["report"], sep="\n")' > requirements.txt \
 && /opt/fedmed/bin/pip install $PIP_OPTIONS --constraint constraints.txt --requirement requirements.txt \
 && pip install $PIP_OPTIONS --constraint constraints.txt hatchling

COPY README.md LICENSE ./
COPY fedmed fedmed
COPY strategies strategies
COPY clients clients
COPY data_prep data_prep
COPY experiments experiments
RUN pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /wheels . \
 && /opt/fedmed/bin/pip install --no-deps --no-index /wheels/*.whl

FROM python:3.11-slim
RUN groupadd --gid 10001 fedmed \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin fedmed
COPY --from=build /opt/fedmed /opt/fedmed
# Nobody is told anything, nothing is installed later, and whatever wants to write writes below /tmp. USER, LOGNAME: some libraries ask for
# a name, which a user id given by `--user` does not have.
ENV PATH=/opt/fedmed/bin:$PATH \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp USER=fedmed LOGNAME=fedmed \
    XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/matplotlib NUMBA_CACHE_DIR=/tmp/numba
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["fedmed"]
CMD ["--help"]
