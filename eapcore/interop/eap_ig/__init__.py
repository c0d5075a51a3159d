"""EAP-IG: its `attribute` with the same arguments and the same numbers, its graph files, and MIB's circuit files.

The package's order of senders and receivers is ours, but it says `input` where we say `embed`, and it keeps rows and
columns for the MLPs of a model without any; they are zero.
"""

from eapcore.interop.eap_ig.attribute import METHODS, attribute
from eapcore.interop.eap_ig.files import MIB_PERCENTAGES, GraphFile, mib_path, save_mib_circuits
from eapcore.interop.eap_ig.names import in_our_order, in_their_order, our_name, their_name, their_shape

__all__ = [
    "METHODS", "MIB_PERCENTAGES", "GraphFile", "attribute", "in_our_order", "in_their_order", "mib_path", "our_name",
    "save_mib_circuits", "their_name", "their_shape",
]  # fmt: skip
