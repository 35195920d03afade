"""A fork as people write them: own files on top of DETR's names, nothing of the project changed."""
