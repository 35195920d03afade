"""An epoch's row of `log.txt`, and what is read from it."""

import math
from datetime import timedelta


def build_row(epoch: int, train_stats: dict, test_stats: dict, n_parameters: int) -> dict:
    """Join the statistics of an epoch into its row of the log."""
    row = {f"train_{name}": value for name, value in train_stats.items()}
    row |= {f"test_{name}": value for name, value in test_stats.items()}
    return {**row, "epoch": epoch, "n_parameters": n_parameters}


def epoch_score(row: dict) -> float:
    """Return the number by which epochs are compared: PQ if there is one, else AP of masks, else of boxes, else -1."""
    if "test_PQ_all" in row:
        return row["test_PQ_all"]["pq"]
    return row.get("test_coco_eval_masks", row.get("test_coco_eval_bbox", [-1.0]))[0]


def table_line(row: dict, seconds: float, best: float) -> str:
    """Summarise an epoch that took so many seconds, as a line of the table that these lines make in the log."""
    columns = [f"epoch {row['epoch']:4}", f"loss {row.get('train_loss', math.nan):8.4f}"]
    if "test_coco_eval_bbox" in row:
        ap, ap50, *_ = row["test_coco_eval_bbox"]
        columns += [f"AP {ap:.3f}", f"AP50 {ap50:.3f}"]
    if "test_PQ_all" in row:
        columns.append(f"PQ {row['test_PQ_all']['pq']:.1f}")
    columns.append(str(timedelta(seconds=round(seconds))))
    if best >= 0:
        columns.append(f"best {best:.3f}" + (" (this one)" if epoch_score(row) == best else ""))
    return " | ".join(columns)
