import torch

from soteacher.randomness import derive_seed, generator


def test_derive_seed_is_the_same_everywhere() -> None:
    # blake2b with an 8-byte digest of "0/order/3", as big-endian number, without its lowest bit.
    assert derive_seed(0, "order", 3) == 0x06561AF60AA54498 >> 1


def test_derive_seed_fits_torch() -> None:
    seeds = [derive_seed(seed, "purpose", key) for seed in range(40) for key in range(40)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == len(seeds)
    torch.manual_seed(max(seeds))


def test_derive_seed_tells_purposes_apart() -> None:
    assert (
        len({derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(0), derive_seed(0, "a", 0), derive_seed(1, "a")})
        == 5
    )


def test_generator_draws_the_same_again_and_leaves_the_global_state() -> None:
    before = torch.random.get_rng_state()
    first = torch.rand(3, generator=generator(1, "views", 2))
    assert torch.equal(first, torch.rand(3, generator=generator(1, "views", 2)))
    assert not torch.equal(first, torch.rand(3, generator=generator(1, "views", 3)))
    assert torch.equal(torch.random.get_rng_state(), before)
