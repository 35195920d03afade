# CPU:  docker build -t detr .
# CUDA: docker build -t detr --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
# Run:  docker run --rm -it --gpus all --shm-size 8g -v /data/coco:/data detr main.py --coco_path /data --output_dir /data/run
#
# --build-arg INDEX=ADDRESS adds a package index: with that of PyTorch's CPU wheels, the CPU image is several GB smaller.
ARG BASE=ubuntu:24.04
FROM ${BASE}
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /detr
ENV PATH=/opt/venv/bin:$PATH
ARG INDEX=
COPY requirements.txt .
RUN python3 -m venv /opt/venv && pip install --no-cache-dir ${INDEX:+--extra-index-url ${INDEX}} -r requirements.txt
COPY . .
ENTRYPOINT ["python"]
CMD ["main.py", "--help"]
