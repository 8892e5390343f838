# A router: no engine, no PyTorch. From the root of the repository:
#
#   docker build -f docker/router.Dockerfile -t sglang-stream-router .
#
#   docker run -p 30000:30000 sglang-stream-router --prefill http://A:30001 8998 --decode http://B:30001
#
# It loads the model's tokenizer: from a folder, where the workers have one, mounted at the same path.

FROM python:3.11.13-slim-bookworm

# The dependencies alone, so that a change of the sources is built in seconds.
WORKDIR /opt/sglang-stream
COPY pyproject.toml README.md ./
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[router]"
COPY router router
COPY sglang_stream sglang_stream
RUN pip install --no-cache-dir --no-deps .

# The worker image's user, so that both can use one volume of models.
RUN useradd --uid 10001 --create-home sglang \
 && install -d -o sglang -g sglang /models
USER 10001
ENV HF_HOME=/models/huggingface
WORKDIR /home/sglang

EXPOSE 30000
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 30000, timeout=4); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
ENTRYPOINT ["sglang-stream", "router", "--host", "0.0.0.0", "--port", "30000"]
