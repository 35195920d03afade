"""The packages that compute COCO's AP, hotcoco and pycocotools, and the ground truth they are given."""

import contextlib
import copyreg
import importlib.util
import io
import warnings

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

BACKENDS = ("auto", "hotcoco", "pycocotools")
USED = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
LARGEST_EXACT = 2**53  # larger image ids are not exact as floats, which evaluation code uses


def ground_truth(coco_gt, with_segmentations: bool = True) -> dict:
    """Return images, categories and annotations of an index in COCO's format, without entries that AP does not use.

    They come from the index's methods, which a subclass may override; an index without methods has at least `imgs`,
    `cats` and `anns`.
    """
    if hasattr(coco_gt, "getAnnIds"):
        image_ids, category_ids = list(coco_gt.getImgIds()), list(coco_gt.getCatIds())
        annotations = coco_gt.loadAnns(coco_gt.getAnnIds(imgIds=image_ids, catIds=category_ids))
    else:
        image_ids, category_ids, annotations = list(coco_gt.imgs), list(coco_gt.cats), list(coco_gt.anns.values())
    sizes = [{name: side for name, side in coco_gt.imgs[i].items() if name in ("height", "width")} for i in image_ids]
    used = (*USED, "segmentation") if with_segmentations else USED
    names = {i: str(coco_gt.cats[i].get("name", i)) if i in coco_gt.cats else str(i) for i in category_ids}
    return {
        "images": [{"id": i, **size} for i, size in zip(image_ids, sizes, strict=True)],
        "categories": [{"id": i, "name": name} for i, name in names.items()],
        # New records, because pycocotools writes into them. Segmentations that are not used may be malformed.
        "annotations": [{name: record[name] for name in used if name in record} for record in annotations],
    }


def renumber(truth: dict) -> dict[int, int]:
    """Replace image ids too large for evaluation code by small ones; return the new id of each original id."""
    image_ids = [image["id"] for image in truth["images"]]
    if max(image_ids, default=0) < LARGEST_EXACT:
        return {image_id: image_id for image_id in image_ids}
    numbers = {image_id: n for n, image_id in enumerate(sorted(image_ids), start=1)}
    for image in truth["images"]:
        image["id"] = numbers[image["id"]]
    for record in truth["annotations"]:
        record["image_id"] = numbers[record["image_id"]]
    return numbers


class Hotcoco:
    """Evaluation by hotcoco, which takes detections as one array."""

    def __init__(self):
        import hotcoco

        # Code written against DETR saves `coco_eval["bbox"].eval`, which holds the parameters.
        copyreg.pickle(hotcoco.Params, _reduce_params)

    def index(self, content: dict):
        import hotcoco

        return hotcoco.COCO(content)

    def detections(self, truth, rows: np.ndarray, codes: list[dict]):
        found = truth.load_res(rows, segmentation=codes or None)
        if codes:  # otherwise the areas would be those of the boxes
            import hotcoco

            found.update_anns(ids=np.arange(1, len(codes) + 1), area=hotcoco.mask.area(codes))
        return found

    def evaluation(self, truth, found, iou_type: str):
        import hotcoco

        return hotcoco.COCOeval(truth, found, iou_type)

    def summarize(self, evaluation) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "hotcoco: max_dets differ")  # as --eval_max_dets asks for
            evaluation.summarize()


def _reduce_params(params):
    """Pickle hotcoco's parameters as pycocotools' (for copyreg)."""
    plain = Params(iouType=params.iouType)
    for name in ("imgIds", "catIds", "iouThrs", "recThrs", "maxDets", "areaRng", "areaRngLbl", "useCats"):
        setattr(plain, name, getattr(params, name))
    return copyreg._reconstructor, (Params, object, None), vars(plain)


class Pycocotools:
    """Evaluation by COCO's own code."""

    def index(self, content: dict) -> COCO:
        coco = COCO()
        coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def detections(self, truth: COCO, rows: np.ndarray, codes: list[dict]) -> COCO:
        if not len(rows):
            return self.index({**truth.dataset, "annotations": []})
        records = rows
        if codes:
            fields = zip(rows[:, 0].tolist(), rows[:, 5].tolist(), rows[:, 6].tolist(), codes, strict=True)
            records = [
                {"image_id": int(i), "category_id": int(label), "score": score, "segmentation": code}
                for i, score, label, code in fields
            ]
        with contextlib.redirect_stdout(io.StringIO()):
            return truth.loadRes(records)

    def evaluation(self, truth: COCO, found: COCO, iou_type: str) -> COCOeval:
        return COCOeval(truth, found, iou_type)

    def summarize(self, evaluation: COCOeval) -> None:
        evaluation.summarize()
        if 100 not in evaluation.params.maxDets:  # the first line is for 100 detections: -1 with another limit
            precision = evaluation.eval["precision"][:, :, :, 0, -1]
            counted = precision[precision > -1]
            evaluation.stats[0] = counted.mean() if counted.size else -1
            print(f" The first line with maxDets={evaluation.params.maxDets[-1]}: {evaluation.stats[0]:.3f}")


def pick_backend(name: str) -> Hotcoco | Pycocotools:
    """Return the evaluation code of a name; "auto" is hotcoco where it is installed."""
    name = "auto" if name == "faster" else name  # the name that older command lines used
    if name not in BACKENDS:
        raise ValueError(f"no evaluation code {name!r}: choose {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("hotcoco") is not None
    if name == "hotcoco" and not installed:
        raise ValueError("--coco_eval hotcoco needs the package hotcoco: pip install hotcoco")
    return Hotcoco() if name == "hotcoco" or (name == "auto" and installed) else Pycocotools()
