"""Find out where and how strongly vectors should steer, and where they should be read, and keep it beside them.

Run it as ``affectlens calibrate VECTORS``. What is measured, and by which rule a layer and a strength are chosen, is fixed in the
study ``calibration``, which ``affectlens study`` runs as well; here stands what becomes of its outcome.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from affectlens.activations import Activations
from affectlens.calibration import Bounds, Calibration, write_calibration
from affectlens.concepts import ConceptSet
from affectlens.engine import Engine
from affectlens.errors import EngineError
from affectlens.readings import Readings
from affectlens.runs import read_json, sha256_file
from affectlens.studies import Bench, Outcome
from affectlens.studies.calibration import CalibrationStudy
from affectlens.studies.separation import best_layer
from affectlens.vectors import ConceptVectors, vectors_folder


def calibrate(
    engine: Engine,
    vectors: str | Path,
    *,
    bounds: Bounds = Bounds(),
    quick: bool = False,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[ConceptVectors, Outcome]:
    """Calibrate the vectors of a folder; ``calibration.json`` is written beside them, and used whenever they are loaded.

    Where the vectors lie in a run, the layer to read at is the one that tells held-out stories apart best (the study
    ``separation``), and the run's activations give a further control. Elsewhere the vectors' own layer is kept. What the model
    answered is kept in ``calibration/`` in the folder, so that a killed calibration goes on where it stopped.

    Args:
        engine: The model of the vectors.
        vectors: Their folder, or a run's.
        bounds: What steering may cost.
        quick: Compare a few layers only, and measure the safe ranges of at most twelve emotions.
        draws, seed: As in :class:`affectlens.studies.Bench`.

    Returns:
        The vectors with their calibration, and what the study found.

    Raises:
        FormatError: There are no vectors in the folder.
        MismatchError: They belong to another model.
        EngineError: They cannot be calibrated; says what is missing.

    Example:
        >>> import affectlens as al
        >>> vectors, found = calibrate(al.open_engine("toy"), "runs/first")  # doctest: +SKIP
        >>> print(vectors.calibrated("calm"))  # doctest: +SKIP
        +0.3 calm @ layer 4
    """
    folder = vectors_folder(vectors)
    loaded = ConceptVectors.load(folder, calibrated=False)
    loaded.check(engine.info)
    run = folder.parent if (folder.parent / "run.json").exists() else None
    activations = Activations(run / "activations") if run and (run / "activations" / "done.json").exists() else None
    readings = Readings(engine, folder / "calibration" / f"{engine.info.fingerprint}-{engine.info.dtype}")
    bench = Bench(
        loaded, ConceptSet.load("emotions"), activations, engine=engine, draws=draws, seed=seed, readings=readings, quick=quick
    )
    outcome = CalibrationStudy(bounds).run(bench)
    separation = run / "study-separation" / "outcome.json" if run else None
    data = read_json(separation)["data"] if separation and separation.exists() else {}
    found = calibration_of(outcome, data)
    if found is None:
        raise EngineError(f"the vectors cannot be calibrated: {outcome.findings[0].note.rstrip('.')}")
    write_calibration(found, folder, vectors=sha256_file(folder / "vectors.safetensors"))
    return loaded.with_calibration(found), outcome


def calibration_of(outcome: Outcome, separation: Mapping[str, Any]) -> Calibration | None:
    """The calibration in the outcome of its study; None where that was untestable.

    Args:
        outcome: Of the study ``calibration``.
        separation: Data of the outcome of the study ``separation``, which chooses where to read; may be empty.
    """
    plain = outcome.data.get("calibration")
    if plain is None:
        return None
    found = Calibration.from_dict(plain)
    return replace(found, reading_layer=best_layer(separation)) if separation else found
