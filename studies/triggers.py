"""Two triggers in one photo: does the map for one class prefer its trigger to the other's?

What a trace keeps is the probability of the class that is explained, as everywhere, also where the other class is the
more probable one: then it is a share of the dense network's small probability.
"""

from __future__ import annotations

from dataclasses import replace

from studies.localisation import predicts
from studies.shared.cases import Case, probabilities
from studies.shared.making import Other
from studies.shared.measure import Study
from studies.shared.photos import test_photos
from studies.shared.rows import DENSE, EIGHT, EQUAL, SMOOTH, Row, Rows, Source, fixed, row, two_levels
from studies.shared.scores import separation
from studies.trojan.images import images_with_one, pair_cases
from studies.trojan.implant import trojaned_network
from studies.trojan.patches import TRIGGERS


def study() -> Study:
    """Set up the study, with the photos in which the network recognises each of the triggers if it is alone."""
    network = trojaned_network()
    photos = test_photos()
    single = images_with_one(network, photos)
    known = {
        sample
        for sample, images in single.items()
        if all(predicts(network, image, TRIGGERS[emoji]) for emoji, image in images.items())
    }
    cases = [case for case in pair_cases(network, photos) if case.sample in known]
    emojis = {target: emoji for emoji, target in TRIGGERS.items()}
    with_its_own, with_the_other = {}, {}
    for case in cases:
        for others, target in ((with_its_own, case.target), (with_the_other, case.rival)):
            assert target is not None
            emoji = emojis[target]
            others[case.name] = Other(f"{case.source} with {emoji} alone", single[case.sample][emoji], target)
    return Study(
        name="triggers",
        title="Share, %, of the map inside both triggers that is inside the one of the class explained",
        network=network,
        cases=cases,
        stages=[_rows()],
        score=separation,
        metric="share",
        others={"its own alone": with_its_own, "the other alone": with_the_other},
        pairs=_PAIRS,
    )


def by_probability(study: Study) -> dict[str, Study]:
    """Divide the questions: about the class that the dense network finds more probable of the two, and the other."""
    parts: dict[str, list[Case]] = {"more": [], "less": []}
    for case in study.cases:
        found = probabilities(study.network, case.image)
        assert case.rival is not None
        parts["more" if found[case.target] >= found[case.rival] else "less"].append(case)
    return {
        part: replace(study, cases=cases, title=f"{study.title}; the {part} probable of the two classes", pairs=())
        for part, cases in parts.items()
    }


def _rows() -> Rows:
    traces = two_levels("sparsegpt")
    return {
        "dense": row("dense network", Source(DENSE), methods=EIGHT),
        "edges": Row("edge detector", plain="edges"),
        "smooth": row("SmoothGrad", SMOOTH),
        "fast 50": row(f"FastSPADE, {EQUAL:.0%}", fixed("sparsegpt", EQUAL)),
        "mine": row("trace for this class", *traces, methods=EIGHT),
        "rival": row("trace for the other class", *two_levels("sparsegpt", goal="rival")),
        "mine alone": row(
            "trace of the photo with this trigger alone",
            *two_levels("sparsegpt", whose="its own alone", goal="theirs"),
        ),
        "rival alone": row(
            "trace of the photo with the other trigger alone",
            *two_levels("sparsegpt", whose="the other alone", goal="theirs"),
        ),
        "mine, smooth": Row("mean of SmoothGrad and the trace for this class", ((SMOOTH,), traces)),
    }


_PAIRS = (
    ("mine", "dense"),
    ("mine", "rival"),
    ("mine alone", "rival alone"),
    ("mine alone", "mine"),
    ("smooth", "dense"),
    ("mine, smooth", "smooth"),
)
