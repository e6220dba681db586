"""The sections that `gpu.py` runs, the most valuable first, so that a run that is cut off has those.

facts.py      one JSON line per fact, on disk at once
driver.py     each section under a deadline, in a worker process that may die; no torch in it
preload.py    imports libraries once; workers are forked from that process
lab.py        the tools of a section: the device, one model at a time, the file of facts
timing.py     events and the host's clock, taken in turns; peaks
machine.py, speed.py, training.py, apart.py, rest.py    the sections
flop.py       FLOP of the models as constants, and the command that counts them
report.py     the facts as a table to read, and README's figures
"""

from benchmarks.gpu_sections.driver import Section

SECTIONS = (
    Section("build", 120, "machine:build", "compile csrc/ beside all the rest", background=True),
    Section("machine", 15, "machine:machine", "versions, matrix product, copy, link, one registered buffer"),
    Section("speed", 70, "speed:speed", "SDXL forward, and forward and back, ours and stock, batch 1 and 4"),
    Section("kernels", 40, "apart:kernels", "each kernel's correctness in bf16", alone=True),
    Section("plan", 90, "training:plan", "cost table; plan and step at 24 GiB, batch 1: peak and seconds"),
    Section("batch4", 60, "training:batch4", "the same at batch 4, where not every option fits while measured"),
    Section("eager", 40, "training:eager", "stock diffusers, PEFT and checkpoints, beside ours, capped and not"),
    Section("graphs", 40, "apart:graphs", "CUDA graphs, SD1.5 and SDXL, batch 1", alone=True),
    Section("offload", 30, "apart:offload", "share of copies hidden; each option's gradients", alone=True),
    Section("decoder", 30, "rest:decoder", "the decoder under each way to keep or repeat it"),
    Section("ops", 120, "rest:ops", "each op beside its peers, every one checked at the timed shape"),
    Section("doctor", 90, "apart:doctor", "the whole examination", alone=True),
    Section("tests", 150, "apart:tests", "pytest on the GPU", alone=True),
    Section("compile", 90, "apart:compiled", "torch.compile of stock blocks, beside ours", alone=True),
)
