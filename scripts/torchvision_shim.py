"""Makes torchvision importable when its compiled operators do not match the installed torch.

The torchvision wheel on the package index is a CUDA build. With a CPU build of torch its operators do not load, and
importing it fails because the schemas of two operators are missing. ComfyUI imports torchvision at startup, and this
project never calls those operators, so declaring the schemas is enough. A `.pth` line imports this module when the
interpreter starts; it does nothing until torchvision is imported.
"""

import sys

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = ("nms", "qnms")


class DeclareOperators:
    """Import hook that declares torchvision's operators just before its import, then removes itself."""

    library = None  # torch forgets the schemas once the library object is collected

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            import torch

            cls.library = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                cls.library.define(operator + SIGNATURE)
        return None


sys.meta_path.insert(0, DeclareOperators)
