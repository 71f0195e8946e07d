"""The parts of the example trainer `train_gpt.py`, one idea per module.

config      what can be set on the command line, and its rules
cluster     ranks, device, and the few collectives the trainer itself needs
model       the GPT
corpus      finds and reads text          tokenizer   bytes or a trained BPE
data        token cache and batches       optim       parameter groups, learning rate
checkpoint  where checkpoints lie and which one is the last complete one
meter       throughput, memory, FLOPs     report      step lines, metrics.jsonl
summary     header lines, summary.json    plot        loss.png
sample      text from the model           stop        SIGTERM as a request to save
trainer     puts them together; the only module that calls torch_mics
"""
