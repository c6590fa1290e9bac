"""To a model hub and back: what of a run is published, its model card, and the transfers themselves."""

from mmft.hub.card import CardFacts, licence_in, model_card
from mmft.hub.client import Hub, Pushed
from mmft.hub.contents import KINDS, Kind, kind_of, stage
from mmft.hub.scrub import is_local

__all__ = ["KINDS", "CardFacts", "Hub", "Kind", "Pushed", "is_local", "kind_of", "licence_in", "model_card", "stage"]
