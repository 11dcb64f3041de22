#!/usr/bin/env bash
# The whole job as jobs that wait for one another: shard, train, then merge and evaluate side by side.
#
#   slurm/pipeline.sh NAME MODEL ACCELERATE_CONFIG RECIPE HELD_OUT INPUT... [-- key=value ...]
#
#   slurm/pipeline.sh runs/e4b google/gemma-4-E4B-it accelerate_configs/zero2.yaml launch/e4b_lora_zero2.yaml \
#     held_out.jsonl logs/*.jsonl -- num_train_epochs=2
#
# NAME becomes a folder: NAME/shards, NAME/adapter, NAME/merged, NAME/eval. A job that fails takes those along that wait
# for it. A job that requeues itself keeps them waiting. PARTS: of the array that shards (default: 4, or one an input).
# Options of sbatch: for all jobs in its own environment (SBATCH_PARTITION, SBATCH_ACCOUNT), for the training job and
# the evaluation in TRAIN_OPTIONS and EVALUATE_OPTIONS: TRAIN_OPTIONS='--nodes=1 --gres=gpu:4'.
set -euo pipefail

usage='usage: slurm/pipeline.sh NAME MODEL ACCELERATE_CONFIG RECIPE HELD_OUT INPUT... [-- key=value ...]'
name=${1:?$usage} model=${2:?$usage} accelerate_config=${3:?$usage} recipe=${4:?$usage} held_out=${5:?$usage}
shift 5
inputs=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do inputs+=("$1"); shift; done
[ ${#inputs[@]} -gt 0 ] || { echo "$usage" >&2; exit 2; }
if [ $# -gt 0 ]; then shift; fi

read -ra train_options <<<"${TRAIN_OPTIONS:-}"
read -ra evaluate_options <<<"${EVALUATE_OPTIONS:-}"
parts=${PARTS:-4}
parts=$((parts < ${#inputs[@]} ? parts : ${#inputs[@]}))
folders=$(seq -s, -f "$name/shards/%g" 0 $((parts - 1)))

# after JOB BATCH_SCRIPT WORDS...: submit what is to start once JOB has ended well; its number.
after() { sbatch --parsable ${1:+--dependency="afterok:$1" --kill-on-invalid-dep=yes} "${@:2}"; }

# Where one cannot be submitted, those before it would wait for nothing, or work for nobody
trap '[ -z "${shard:-}" ] || scancel "$shard" ${train:+"$train"} ${merge:+"$merge"}' ERR
shard=$(after '' --array="0-$((parts - 1))" slurm/shard.sbatch "$name/shards" "$model" "${inputs[@]}")
train=$(after "$shard" "${train_options[@]}" slurm/train.sbatch "$accelerate_config" "$recipe" \
  "model_name_or_path=$model" "data.train=[$folders]" "output_dir=$name/adapter" "$@")
merge=$(after "$train" slurm/merge.sbatch --base "$model" --adapter "$name/adapter" --out "$name/merged")
evaluate=$(after "$train" "${evaluate_options[@]}" slurm/evaluate.sbatch "$accelerate_config" --model "$model" \
  --adapter "$name/adapter" --data "$held_out" --out "$name/eval")
echo "shard $shard, then train $train, then merge $merge and evaluate $evaluate:" \
  "squeue -j $shard,$train,$merge,$evaluate"
