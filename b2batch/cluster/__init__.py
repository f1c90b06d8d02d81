"""The only importer of ray: who computes which unit, where, and what happens when one dies."""
