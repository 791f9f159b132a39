"""Imported once by the fork server of `kills.py`, so that an attempt costs no import."""

import tests.faults.jobs  # noqa: F401
import tests.method_cases  # noqa: F401
import tools.export_backbone  # noqa: F401
import tools.make_ffcv_dataset  # noqa: F401
import tools.make_webdataset  # noqa: F401
import tools.support.exports  # noqa: F401
import train.eval.fewshot  # noqa: F401
import train.eval.knn_protocol  # noqa: F401
import train.eval.linear  # noqa: F401
import train.eval.semi  # noqa: F401
import train.evaluate  # noqa: F401
