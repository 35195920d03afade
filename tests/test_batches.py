import pytest

from datasets.batches import EvalBatches, TrainBatches


def test_processes_share_the_images_as_one_process_would_batch_them():
    alone = TrainBatches(20, 4, seed=1)
    shares = [TrainBatches(20, 2, seed=1, rank=r, world_size=2) for r in range(2)]
    for epoch in (0, 1):
        for batches in (alone, *shares):
            batches.set_epoch(epoch)
        together = [sorted(a + b) for a, b in zip(*shares, strict=True)]
        assert together == [sorted(batch) for batch in alone]
    assert sorted(sum(alone, [])) == list(range(20))


def test_every_epoch_has_its_own_order_and_repeats_it():
    batches = TrainBatches(50, 5)
    first = list(batches)
    assert first == list(batches)
    batches.set_epoch(1)
    assert first != list(batches)


def test_a_resumed_epoch_goes_on_where_it_stopped():
    batches = TrainBatches(21, 4)
    whole = list(batches)
    batches.set_epoch(0, seen=12)
    assert list(batches) == whole[3:] and len(batches) == len(whole) - 3 == 2
    batches.set_epoch(0, seen=21)
    assert list(batches) == [] and len(batches) == 0


@pytest.mark.parametrize("before, after", [((3, 2), (2, 2)), ((2, 2), (4, 1)), ((1, 4), (4, 2))])
def test_other_processes_go_on_at_the_same_image(before, after):
    def epoch(batch_size, world, seen):
        ranks = [TrainBatches(24, batch_size, 7, rank, world) for rank in range(world)]
        for rank in ranks:
            rank.set_epoch(5, seen)
        return [sorted(sum(together, [])) for together in zip(*ranks, strict=True)]

    first = epoch(*before, 0)[:2]
    rest = epoch(*after, seen=sum(map(len, first)))
    assert sorted(sum(first + rest, [])) == list(range(24))


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match="3 training images .* batch of 4 .*use a smaller batch size"):
        TrainBatches(3, 4)


@pytest.mark.parametrize("length, world", [(7, 1), (7, 2), (2, 3)])
def test_evaluation_sees_every_image_once(length, world):
    seen = [i for rank in range(world) for batch in EvalBatches(length, 2, rank, world) for i in batch]
    assert sorted(seen) == list(range(length))


def test_only_images_of_one_size_share_a_batch_without_padding():
    sizes = [(4, 4), (4, 6), (4, 4), (4, 4), (4, 6)]
    batches = list(EvalBatches(5, 2, sizes=sizes))
    assert sorted(batches) == [[0, 2], [1, 4], [3]] and len(batches) == 3
