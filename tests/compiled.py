"""
Train with and without torch.compile, and print the losses as JSON: `python tests/compiled.py BASE FOLDER`.

What dynamo compiles, and how often it may do so again, holds for a whole process: so this has one of its own.
"""
import json
import sys

from test_runs import logged, make

base, folder = sys.argv[1:]
WAYS = {
    "plain": {},
    "eager": {"torch_compile": True, "torch_compile_backend": "eager"},
    "aot_eager, padded": {"torch_compile": True, "torch_compile_backend": "aot_eager", "layout": "padded"},
}
losses = {}
for name, options in WAYS.items():
    trainer = make(base, folder, max_steps=2, **options)
    trainer.train()
    losses[name] = logged(trainer, "loss")
print("losses:", json.dumps(losses))
