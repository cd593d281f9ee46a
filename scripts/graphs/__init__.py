"""The graphs of the templates, of the subgraph blueprints and of the help pages' pictures."""
