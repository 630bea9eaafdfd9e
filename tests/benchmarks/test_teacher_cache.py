import numpy as np
import pytest
from benchmarks.teacher_cache import KEPT, LIVE, measure, study_settings, train_teacher

EXAMPLES, EPOCHS = 32, 2


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", EXAMPLES), ("test", 12)):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 4
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return {"source": "npz", "path": str(path)}


@pytest.mark.usefixtures("no_report", "one_core")
def test_measure_reads_what_another_student_has_asked(data, tmp_path):
    teacher = train_teacher(data, "resnet8", tmp_path / "teacher", batch_size=16, epochs=1, data_root=None)
    settings = study_settings(
        data, teacher, model="resnet8", methods=["kd", "dkd"], seeds=1, epochs=EPOCHS, batch_size=16
    )
    found = measure(settings, tmp_path, rounds=2, data_root=None, workers=1)
    assert found["plan"]["workers"] == 1
    wanted = 2 * EPOCHS * EXAMPLES
    answers = found["answers"]
    assert answers["wanted"] == wanted
    # Both methods draw the same views; those of one epoch differ from the other's, but for a few.
    assert 0.9 * wanted / 2 < answers["kept"] <= wanted / 2
    assert answers["share_read"] == 1 - answers["kept"] / wanted
    assert answers["bytes_on_disk"] >= answers["kept"] * 2 * 4
    for row in found["ways"].values():
        assert row["study_seconds"] > row["students_seconds"] > 0
        assert row["images_per_second"] == pytest.approx(wanted / row["students_seconds"])
    for of_arm in found["accuracies"].values():
        assert len(of_arm[LIVE]) == len(of_arm[KEPT]) == 1
        assert of_arm["mean_difference"] == pytest.approx(np.mean(of_arm[KEPT]) - np.mean(of_arm[LIVE]))
        assert all(0 <= accuracy <= 1 for way in (LIVE, KEPT) for accuracy in of_arm[way])
