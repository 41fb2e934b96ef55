"""DEAR-CNN reproduced: `reproduction` makes tables and figures."""
