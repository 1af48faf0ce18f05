"""Which models there are, and bringing them up: found on disk, loaded, measured, probed, served, unloaded.

Imports `inference`, `execution`, `model`, `batching` and what is below them. Public are `control` (ModelControl),
`knee` (RUN_COST, SIZES, SURPLUS, knee), `loader` (LoadedModel), `model_folder` (ModelFolder), `model_version`
(VersionState, ModelVersion), `repository` (Repository).
"""
