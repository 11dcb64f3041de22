# gemma_dist in the versions that were tested (constraints.txt): docker build --tag gemma-dist .
#
#   docker run --gpus all --shm-size 8g --volume "$PWD:/work" gemma-dist doctor
#   docker run --gpus all --shm-size 8g --volume "$PWD:/work" gemma-dist train launch/e4b_qlora_16gb.yaml
#
# torch brings its own CUDA; the host needs NVIDIA's driver and container toolkit. On Slurm: CONTAINER_IMAGE (pyxis).
FROM python:3.12-slim

# g++ and ninja: DeepSpeed compiles an operator at its first use
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/gemma_dist
COPY constraints.txt ./
# First what changes rarely, so that a change of ours does not fetch torch again.
RUN pip install --no-cache-dir --constraint constraints.txt accelerate bitsandbytes datasets deepspeed ninja peft \
    torch torchvision transformers trl
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[s3,gcs,logging]'

RUN useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["gemma-dist"]
CMD ["--help"]
