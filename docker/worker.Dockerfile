# A worker: SGLang with stream support. From the root of the repository:
#
#   docker build -f docker/worker.Dockerfile -t sglang-stream-worker .
#   docker build -f docker/worker.Dockerfile -t sglang-stream-worker:cpu --build-arg VARIANT=cpu .
#
#   docker run --gpus all sglang-stream-worker --role unified --model-path Qwen/Qwen2.5-7B-Instruct

ARG VARIANT=cuda

# SGLang's own image has it, PyTorch and Mooncake in the versions that pyproject.toml asks for.
FROM lmsysorg/sglang:v0.5.17 AS cuda

FROM python:3.11.13-slim-bookworm AS cpu
# Libraries of Mooncake, and a compiler for SGLang's kernels.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      g++ libibverbs1 libnuma1 librdmacm1 liburing2 numactl \
 && rm -rf /var/lib/apt/lists/* \
 && pip install --no-cache-dir mooncake-transfer-engine-non-cuda==0.3.13.post1

# hadolint ignore=DL3006
FROM ${VARIANT}

# SGLang ends itself by signals, which a process with id 1 would not get: tini is that process.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/*

# The dependencies alone, so that a change of the sources is built in seconds. The system's Python is
# nobody else's here.
WORKDIR /opt/sglang-stream
COPY pyproject.toml README.md ./
# hadolint ignore=DL3013
RUN python3 -m pip install --break-system-packages --no-cache-dir ".[server]"
# `calibrate` and `bench` are run where the workers will be.
COPY experiments experiments
COPY retrieval_clients retrieval_clients
COPY router router
COPY sglang_stream sglang_stream
RUN python3 -m pip install --break-system-packages --no-cache-dir --no-deps .

# A volume on /models that is new takes the owner from here.
RUN useradd --uid 10001 --create-home sglang \
 && install -d -o sglang -g sglang /models
USER 10001
ENV HF_HOME=/models/huggingface
WORKDIR /home/sglang

# HTTP, chunks of streams, and where decode workers find a prefill worker.
EXPOSE 30001 31001 8998
# SGLang answers after a second at the earliest, and after 20 s if its scheduler does not.
HEALTHCHECK --interval=15s --timeout=30s --start-period=20m --retries=4 \
  CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 30001, timeout=25); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--", "sglang-stream", "worker", "--host", "0.0.0.0", "--port", "30001", "--stream-host", "0.0.0.0", "--stream-port", "31001"]
