import torch

from soteacher.objectives.example_rows import example_rows


def test_maps_of_either_layout_become_rows_without_a_copy() -> None:
    maps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    last = maps.contiguous(memory_format=torch.channels_last)
    for layout in (maps, last):
        rows = example_rows(layout)
        assert rows.shape == (2, 60)
        assert rows.data_ptr() == layout.data_ptr()
    assert torch.equal(example_rows(maps), maps.flatten(1))
    assert torch.equal(example_rows(maps).sort().values, example_rows(last).sort().values)


def test_features_of_other_shapes_become_rows() -> None:
    assert example_rows(torch.zeros(2, 3)).shape == (2, 3)
    assert example_rows(torch.zeros(2, 3, 4)).shape == (2, 12)
