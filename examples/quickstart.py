"""Convert a ResNet-18, look at it, train one step, save it and load it again.

Run `python examples/quickstart.py --out bnn.pt`; it takes some seconds on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from el_convert import binarize, load, save, summarize


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert, train one step, save, load.")
    parser.add_argument("--out", type=Path, default=Path("bnn.pt"), help="file to write")
    out: Path = parser.parse_args().out

    torch.manual_seed(0)
    model = binarize(timm.create_model("resnet18", num_classes=10))
    print(summarize(model))

    # One step on random data. A real training run takes many epochs on real data.
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    gamma = model.get_parameter("layer2.0.downsample.0.link.gamma")
    print(f"loss {loss.item():.2f}; one gate started at 1 and is now {gamma[0].item():.3f}")

    save(model, out)
    again = load(out)
    model.eval()
    again.eval()
    with torch.no_grad():
        same = torch.equal(model(images), again(images))
    if not same:
        raise SystemExit(f"{out} does not give the model back")
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB); loaded again, it answers the same")


if __name__ == "__main__":
    main()
