"""The proof that every launch trains the same model: each way of training learns what one plain process learns.

    make parity                              all cells: some three hours on 2 cores
    python -m tests.parity --pruned          every launch, tuning, style, kind of data and option at least once
    python -m tests.parity --only zero3      cells whose name has these words

Each launch is real: processes under `accelerate launch` with a file of accelerate_configs/ (gloo, DeepSpeed,
bitsandbytes' NF4, all on the CPU), tiny Gemma 4 models of transformers' own classes, shards, and the function that
`gemma-dist train` calls. A cell is compared with its reference: one process in float32 that takes the same
trajectories, each in a row of its own, without checkpointing, packing or accumulation. Compared are

- loss: of each of five steps, relative;
- gradient: of each trained tensor at step 1, as |difference| / |reference|, where tensors with less than a thousandth
  of the largest gradient count as that long (what is left of them is rounding);
- logits: of the result, loaded in this process by plain transformers and PEFT, against those of the trained model
  where it trained, relative to the largest;
- names: the tensors in the header of the result and of its last checkpoint have the names, shapes and dtypes of the
  base's, and an adapter the names and shapes of its reference's;
- copies: what the ranks held ready for a checkpoint are the tensors in its files, on rank 0, and nothing elsewhere;
- resume: losses and gradient norms of steps 3 to 5, resumed from the checkpoint of step 2: equal to the last bit in the
  same launch, within the limit in another.

`cells.py` says what is run, `bench.py` runs it in processes of `worker.py`, `judge.py` compares, `table.py` shows.
"""
