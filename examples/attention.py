"""Attention at step zero: the variance of the logits over the keys, and how evenly the attention is spread.

python examples/attention.py
"""

import torch
from torch import nn

import gainstage as gs


def main() -> None:
    """A decoder with self-attention and cross-attention: as torch draws it, as planned, and with quieter logits."""
    torch.manual_seed(0)
    model = nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
    args = (torch.randn(4, 20, 64), torch.randn(4, 12, 64))
    report("as torch draws it", model, args)

    plan = gs.initialize(model, args)
    report("planned", model, args)
    print(plan.explain("decoder.layers.0.multihead_attn.in_proj_weight"))

    gs.initialize(model, args, policy=gs.policies.unit(logit_variance=0.25))
    report("logit_variance=0.25", model, args)


def report(title: str, model: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """Predicted from the present parameters."""
    print(title)
    for signal in gs.inspect(model, args, gradients=False).attention:
        print(f"  {signal.path}: logits {signal.logit_variance:.3f}, entropy {signal.entropy:.1%} of log {signal.keys}")


if __name__ == "__main__":
    main()
