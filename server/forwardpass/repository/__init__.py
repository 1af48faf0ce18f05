"""Which models there are, and bringing them up: found on disk, loaded, measured, probed, served, unloaded.

Imports `inference`, `execution`, `model`, `batching` and what is below them. Public are `control` (CHANGES,
ModelControl), `knee` (RUN_COST, SIZES, SURPLUS, knee), `listing` (RepositoryListing), `loader` (LoadedModel),
`model_folder` (ModelFolder), `model_version` (VersionState, ModelVersion, number), `on_demand` (OnDemand),
`repository` (Repository), `shared_measurements` (Known), `turns` (Turns).
"""
