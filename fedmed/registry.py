"""Names users may write in a configuration, each with the import path of what it stands for.

One line per method and kind; a module is imported when its name is first used, so listing names costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from fedmed.errors import UserError

STRATEGIES: dict[str, str] = {
    "fedavg": "fedmed.federation.strategy:Strategy",
    "fedavgm": "strategies.server_optimizer:FedAvgM",
    "fedadam": "strategies.server_optimizer:FedAdam",
    "fednoro": "strategies.noise_robust:FedNoRo",
    "feda3i": "strategies.quality_layerwise:FedA3I",
    "fedism": "strategies.sharpness_matching:FedISM",
    "fedism_plus": "strategies.sharpness_matching:FedISMPlus",
    "fedia": "strategies.completeness:FedIA",
    "qfedavg": "strategies.q_fair:QFedAvg",
    "agnostic": "strategies.agnostic:AgnosticFL",
    "fairfed": "strategies.fair_gap:FairFed",
    "fedga": "strategies.generalization_gap:FedGA",
    "scaffold": "strategies.control_variates:Scaffold",
    "fednova": "strategies.normalized_averaging:FedNova",
    "fedmlp": "strategies.missing_classes:FedMLP",
    "passion": "strategies.modality_balance:Passion",
    "fedmix": "strategies.selected_loss:FedMix",
    "fedlppa": "strategies.prompt_affinity:FedLPPA",
}

CLIENTS: dict[str, str] = {
    "supervised": "clients.supervised:Supervised",
    "local_norm": "clients.local_norm:LocalNorm",
    "fednoro": "clients.noise_robust:NoiseRobust",
    "feda3i": "clients.quality_features:QualityFeatures",
    "fedism": "clients.sharpness_aware:SharpnessAware",
    "fedia": "clients.annotation_completion:AnnotationCompletion",
    "loss_probe": "clients.received_probe:LossProbe",
    "accuracy_probe": "clients.received_probe:AccuracyProbe",
    "scaffold": "clients.control_variates:ControlVariates",
    "fednova": "clients.step_count:StepCount",
    "ditto": "clients.personal_model:Ditto",
    "fedmlp": "clients.missing_classes:MissingClasses",
    "personal_head": "clients.personal_head:PersonalHead",
    "fca": "clients.classifier_anchoring:ClassifierAnchoring",
    "passion": "clients.modality_distillation:ModalityDistillation",
    "weak": "clients.weak_annotation:WeakAnnotation",
    "fedmix": "clients.cross_pseudo:CrossPseudo",
    "fedicra": "clients.site_contrast:SiteContrast",
    "fedlppa": "clients.prompted_decoders:PromptedDecoders",
}

ADDONS: dict[str, str] = {
    "prox": "clients.prox:Proximal",
    "npr": "clients.prototype_regulariser:PrototypeRegulariser",
}

MODELS: dict[str, str] = {
    "small_cnn": "fedmed.models.small_cnn:SmallCNN",
    "unet": "fedmed.models.unet:UNet",
    "two_heads": "fedmed.models.two_heads:TwoHeads",
    "multi_encoder_unet": "fedmed.models.multi_encoder_unet:MultiEncoderUNet",
    "side_unet": "fedmed.models.side_unet:SideUNet",
    "site_unet": "fedmed.models.site_unet:SiteUNet",
    "prompt_unet": "fedmed.models.prompt_unet:PromptUNet",
    "two_networks": "fedmed.models.two_networks:TwoNetworks",
}

LOSSES: dict[str, str] = {
    "ce": "fedmed.losses.classification:cross_entropy",
    "logit_adjusted_ce": "fedmed.losses.classification:logit_adjusted_cross_entropy",
    "bce": "fedmed.losses.segmentation:bce_with_logits",
    "bce_dice": "fedmed.losses.segmentation:bce_dice",
    "ce_dice": "fedmed.losses.segmentation:ce_dice",
    "dice": "fedmed.losses.segmentation:dice",
}

PARTITIONS: dict[str, str] = {
    "natural": "data_prep.partition:Natural",
    "iid": "data_prep.partition:Iid",
    "dirichlet": "data_prep.partition:Dirichlet",
    "fednoro": "data_prep.partition:FedNoRoPartition",
    "fedism": "data_prep.partition:FedISMPartition",
    "natural_dirichlet": "data_prep.partition:NaturalDirichlet",
}

CORRUPTIONS: dict[str, str] = {
    "label_noise": "data_prep.corruption.label_noise:LabelNoise",
    "contour_noise": "data_prep.corruption.contour_noise:ContourNoise",
    "image_quality": "data_prep.corruption.image_quality:ImageQuality",
    "dropped_annotation": "data_prep.corruption.dropped_annotation:DroppedAnnotation",
    "missing_classes": "data_prep.corruption.missing_classes:MissingClasses",
    "missing_modality": "data_prep.corruption.missing_modality:MissingModality",
    "weak_labels": "data_prep.corruption.weak_labels:WeakLabels",
}

IMPORTERS: dict[str, str] = {
    "images": "data_prep.importers.images:Images",
    "nifti": "data_prep.importers.nifti:NiftiVolumes",
    "dicom": "data_prep.importers.dicom:DicomSeries",
    "medmnist": "data_prep.importers.medmnist:MedMNIST",
    "ham10000": "data_prep.importers.presets.ham10000:Ham10000",
    "isic": "data_prep.importers.presets.isic:Isic",
    "chestxray14": "data_prep.importers.presets.chestxray14:ChestXray14",
    "lgg": "data_prep.importers.presets.lgg:Lgg",
    "acdc": "data_prep.importers.presets.acdc:AcdcScribbles",
    "chase": "data_prep.importers.presets.chase:Chase",
    "brats": "data_prep.importers.presets.brats:Brats",
}

# What `fedmed data` does, by command; lives in the methods layer, hence by name.
DATA_TOOLS: dict[str, str] = {
    "import": "data_prep.importers.run:import_data",
    "check": "data_prep.checks:check_file",
    "split": "data_prep.tools:split_file",
    "corrupt": "data_prep.tools:corrupt_file",
    "phantom": "data_prep.tools:phantom_file",
}

# Applied before a run; lives in the methods layer, hence by name.
DERIVE = "data_prep.protocol:derive"

# How `fedmed predict` prepares images as the import did; lives in the methods layer, hence by name.
PREPARE = "data_prep.importers.prepare:make_preparation"

KINDS: dict[str, dict[str, str]] = {
    "strategy": STRATEGIES,
    "client": CLIENTS,
    "add-on": ADDONS,
    "model": MODELS,
    "loss": LOSSES,
    "partition": PARTITIONS,
    "corruption": CORRUPTIONS,
    "importer": IMPORTERS,
}


def import_attribute(path: str) -> Any:
    """Import `module:attribute`.

    Raises `UserError` when the module or the attribute does not exist.
    """
    module_name, _, attribute = path.partition(":")
    if not attribute:
        raise UserError(f"expected an import path 'module:attribute', got {path!r}")
    try:
        module = importlib.import_module(module_name)
        return getattr(module, attribute)
    except ModuleNotFoundError as error:
        raise UserError(f"cannot import {path!r}: {error}. Is the package installed?") from error
    except AttributeError as error:
        raise UserError(f"module {module_name!r} has no attribute {attribute!r}") from error


def resolve(kind: str, name: str) -> Any:
    """Give the class or function that `name` stands for among the registered `kind`s.

    A name with a colon is taken as an import path, so a method that lives outside the repository needs no registry line.
    Raises `UserError` naming the nearest registered name.
    """
    names = KINDS[kind]
    if name in names:
        return import_attribute(names[name])
    if ":" in name:
        return import_attribute(name)
    from fedmed.config import nearest

    raise UserError(f"no {kind} is called {name!r}{nearest(name, names)} (`fedmed list` shows all)")
