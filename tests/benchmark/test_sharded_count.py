"""What a GPU holds of weights that several share, counted."""

import pytest

from finetune.benchmark.sharded_count import FEWEST, count_layers, count_sharded, pretended_ranks
from finetune.benchmark.synthetic import make_config


def test_few_layers_scale_to_all_and_weights_are_shared_out() -> None:
    """Eight layers are counted at four and at six; counted as they are, they hold the same."""
    config = make_config("20b", tiny=True, num_layers=FEWEST + 4)
    scaled = count_sharded(config, num_gpus=4, max_length=256, batch_size=1)
    with pretended_ranks(4) as mesh:
        whole = count_layers(config, mesh, ids=(1, 256), activation_checkpointing=True)
        few = count_layers(
            make_config("20b", tiny=True, num_layers=2),
            mesh,
            ids=(1, 256),
            activation_checkpointing=True,
        )
    assert scaled == pytest.approx(whole, rel=1e-2)
    with pretended_ranks(2) as mesh:
        of_two = count_layers(
            make_config("20b", tiny=True, num_layers=2),
            mesh,
            ids=(1, 256),
            activation_checkpointing=True,
        )
    assert of_two["weights, fp32"] == pytest.approx(2 * few["weights, fp32"], rel=1e-2)
    assert few["AdamW's states"] == 2 * few["weights, fp32"] == 2 * few["their gradients"]
    assert few["peak"] > 4 * few["weights, fp32"]
