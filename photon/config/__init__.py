"""The configuration of a run: schema, composition, helpful errors, the tree of federations."""
