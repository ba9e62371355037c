"""What a device computes in as it is."""

import torch

from model.numerics import suits

CARD = torch.device("cuda")


def test_what_a_card_emulates_does_not_suit_it(monkeypatch):
    def is_supported(including_emulation):
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert not suits(torch.bfloat16, CARD)
    assert suits(torch.float16, CARD) and suits(torch.float32, CARD)
