"""Photon's ServerApp: read the configuration, run the federation."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation on ``grid``.

    The run config brings either ``config``, a resolved configuration, or ``overrides`` for ``conf/``;
    with neither, the default federation trains.
    """
    from photon.config.compose import settings_from
    from photon.engine.batches import batching
    from photon.federation.results import show
    from photon.federation.run import prepare_run, run_federation
    from photon.preflight import preflight

    config, resume = settings_from(context.run_config)
    config = prepare_run(preflight(config))
    run_federation(config, batching(grid, config), resume=resume, live=False)
    if not context.run_config["config"]:
        # Nobody composed the configuration before us, so nobody shows the result after us.
        show(config)
