"""Devices and prices: read from data/hardware.yaml and data/prices.yaml, checked on reading."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

Purchase = Literal["on_demand", "spot"]
_PURCHASES: tuple[Purchase, ...] = ("on_demand", "spot")


class CatalogueError(ValueError):
    """A price or hardware file that cannot be used; the message names the entry and the fix."""


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks of one device: FLOP/s of half-precision tensor cores, bytes/s and bytes of memory."""

    name: str
    half_flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: float


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to rent one device."""

    gpu: str
    purchase: Purchase
    usd_per_hour: float
    cloud: str
    instance: str
    source: str


@dataclass(frozen=True, slots=True)
class PublicPrice:
    """What a translation service charges, USD per million source characters."""

    service: str
    usd_per_million_chars: float
    source: str


@dataclass(frozen=True, slots=True)
class CpuMachine:
    """A machine without a GPU that could translate instead."""

    instance: str
    vcpus: int
    usd_per_hour: float
    cloud: str
    source: str


@dataclass(frozen=True, slots=True)
class PriceCatalogue:
    """All prices of one date."""

    date: str
    offers: tuple[Offer, ...]
    public: tuple[PublicPrice, ...]
    cpu_machines: tuple[CpuMachine, ...]

    def offer(self, gpu: str, purchase: Purchase = "on_demand") -> Offer:
        """The cheapest offer of a GPU; raises CatalogueError naming what there is."""
        found = [offer for offer in self.offers if offer.gpu == gpu and offer.purchase == purchase]
        if not found:
            known = sorted({offer.gpu for offer in self.offers if offer.purchase == purchase})
            raise CatalogueError(f"no {purchase} price for {gpu!r}; the catalogue of {self.date} has {', '.join(known)}")
        return min(found, key=lambda offer: offer.usd_per_hour)


def devices() -> dict[str, Device]:
    """All known GPUs by name."""
    raw = yaml.safe_load(_shipped("hardware.yaml"))
    return {
        name: Device(name, peaks["half_tflops"] * 1e12, peaks["memory_gb_per_s"] * 1e9, peaks["memory_gb"] * 1e9)
        for name, peaks in raw["devices"].items()
    }


def price_catalogue(path: Path | None = None) -> PriceCatalogue:
    """The catalogue that ships, or one of the same form at `path`. Raises CatalogueError for an entry that cannot be
    used.
    """
    raw = yaml.safe_load(path.read_text() if path else _shipped("prices.yaml"))
    where = path or "prices.yaml"
    if not isinstance(raw, dict) or "offers" not in raw or "date" not in raw:
        raise CatalogueError(f"{where}: needs `date` and `offers`; copy the file that ships and change it")
    offers = tuple(_offer(entry, f"{where}: offer {index + 1}") for index, entry in enumerate(raw["offers"]))
    public = tuple(PublicPrice(**entry) for entry in raw.get("public_translation", ()))
    return PriceCatalogue(
        str(raw["date"]), offers, public, tuple(CpuMachine(**entry) for entry in raw.get("cpu_machines", ()))
    )


def _offer(entry: Any, where: str) -> Offer:
    try:
        offer = Offer(**entry)
    except TypeError as error:
        raise CatalogueError(f"{where}: {error}; fields are gpu, purchase, usd_per_hour, cloud, instance, source") from error
    if offer.purchase not in _PURCHASES:
        raise CatalogueError(f"{where}: purchase is {offer.purchase!r}; choose on_demand or spot")
    if not isinstance(offer.usd_per_hour, (int, float)) or not offer.usd_per_hour > 0:
        raise CatalogueError(f"{where}: usd_per_hour is {offer.usd_per_hour!r}; it must be a positive number")
    return offer


def _shipped(name: str) -> str:
    return (resources.files("app.cost") / "data" / name).read_text()


def usd_per_million_chars(usd_per_hour: float, chars_per_s: float) -> float:
    """USD per million source characters of something that costs `usd_per_hour` while it translates `chars_per_s`."""
    if not chars_per_s > 0:
        raise ValueError(f"chars_per_s is {chars_per_s}; it must be positive")
    return usd_per_hour / (3600.0 * chars_per_s) * 1e6
