"""What the files of docker/ promise: walls between silos, nothing secret in an image, nothing unlimited."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from photon.silo.site import read_settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
SILOS = ["silo-1", "silo-2", "silo-3", "silo-4"]
LASTING = ["superlink", "superexec", "proxy", *SILOS]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def read(name: str) -> dict[str, Any]:
    """Read a compose file with the defaults of its variables."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DOCKER / name).read_text())
    assert "${" not in text, "every variable has a default"
    return yaml.safe_load(text)


def target(mount: str) -> str:
    return mount.split(":")[1]


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Do what compose does with `extends`, for the keys that these files use."""
    mounts = {target(mount): mount for mount in [*base.get("volumes", []), *over.get("volumes", [])]}
    return base | over | ({"volumes": list(mounts.values())} if mounts else {})


def resolve(service: dict[str, Any]) -> dict[str, Any]:
    if "extends" not in service:
        return service
    base = read(service["extends"]["file"])["services"][service["extends"]["service"]]
    return merged(base, {key: value for key, value in service.items() if key != "extends"})


COMPOSE = read("compose.yaml")
SERVICES = {name: resolve(service) for name, service in COMPOSE["services"].items()}
LONE_SILO = read("silo.yaml")["services"]["silo"]


def networks(name: str) -> set[str]:
    return set(SERVICES[name].get("networks", []))


# --- walls --------------------------------------------------------------------------------------------


def test_the_services_are_those_that_the_tests_know() -> None:
    assert set(SERVICES) == {*LASTING, "cli", "prepare"}


@pytest.mark.parametrize("silo", SILOS)
def test_a_silo_meets_nobody_but_the_proxy(silo: str) -> None:
    assert networks(silo) == {silo}
    assert "network_mode" not in SERVICES[silo]
    assert {name for name in SERVICES if silo in networks(name)} == {silo, "proxy"}
    assert COMPOSE["networks"][silo] == {"internal": True}
    assert SERVICES["proxy"]["networks"][silo] == {"aliases": ["aggregator"]}


def test_the_superlink_is_on_the_core_alone_and_only_the_proxy_has_a_port() -> None:
    assert networks("superlink") == networks("superexec") == networks("cli") == {"core"}
    assert COMPOSE["networks"]["core"] == {"internal": True}
    assert [name for name in SERVICES if "ports" in SERVICES[name]] == ["proxy"]
    # Until the operator opens it, it listens to this machine alone.
    assert SERVICES["proxy"]["ports"] == ["127.0.0.1:8443:8443"]
    assert SERVICES["prepare"]["network_mode"] == "none"
    assert not networks("prepare")


def test_a_silo_mounts_its_own_folder_and_nothing_else() -> None:
    for silo in SILOS:
        mounts = SERVICES[silo]["volumes"]
        assert {mount.split(":")[0].removeprefix("../runs/docker/").split("/")[0] for mount in mounts} == {
            silo
        }
        assert not SERVICES[silo].get("secrets")


@pytest.mark.parametrize("name", [*SILOS, "silo"])
def test_text_and_keys_are_mounted_for_reading_only(name: str) -> None:
    mounts = (SERVICES | {"silo": LONE_SILO})[name]["volumes"]
    assert {target(mount) for mount in mounts if not mount.endswith(":ro")} == {"/state"}
    assert {target(mount) for mount in mounts if mount.endswith(":ro")} == {
        "/data",
        "/run/secrets/node-key",
        "/run/secrets/authority-certificate",
    }


# --- every container ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LASTING, "silo"])
def test_what_lasts_is_watched_restarted_and_bounded(name: str) -> None:
    service = (SERVICES | {"silo": LONE_SILO})[name]
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] == "CMD"
    assert float(service["cpus"]) > 0
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert service["pids_limit"] > 0
    assert service["logging"]["options"]["max-size"]


@pytest.mark.parametrize("name", [*SERVICES, "silo"])
def test_a_container_has_no_rights_that_it_does_not_need(name: str) -> None:
    service = (SERVICES | {"silo": LONE_SILO})[name]
    assert service["user"].split(":")[0] not in {"0", "root"}
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    # Nobody else would reap orphans.
    assert service["init"] is True
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & set(service)


@pytest.mark.parametrize("name", [*SERVICES, "silo"])
def test_images_have_the_version_of_the_project(name: str) -> None:
    image, _, tag = (SERVICES | {"silo": LONE_SILO})[name]["image"].partition(":")
    assert image in {"photon", "photon-proxy"}
    assert tag == VERSION


def test_only_those_who_need_a_secret_are_given_it() -> None:
    holders = {
        secret: {name for name in SERVICES if secret in SERVICES[name].get("secrets", [])}
        for secret in COMPOSE["secrets"]
    }
    assert holders["server-key"] == {"superlink", "proxy"}
    assert holders["superexec-secret"] == {"superlink", "superexec"}
    assert "authority.key" not in (DOCKER / "compose.yaml").read_text()


def test_each_silo_has_a_gpu_of_its_own() -> None:
    services = read("compose.gpu.yaml")["services"]
    assert list(services) == SILOS
    used = []
    for service in services.values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]
        used += device["device_ids"]
    assert used == ["0", "1", "2", "3"]
    assert list(read("silo.gpu.yaml")["services"]) == ["silo"]


# --- what Flower makes of it --------------------------------------------------------------------------


def test_flower_understands_the_commands() -> None:
    from flwr.common.config import parse_config_args
    from flwr.supercore.cli.flower_superexec import _parse_args as superexec
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink as superlink
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode as supernode

    for name, parser in {"superlink": superlink(), "superexec": superexec(), "silo-1": supernode()}.items():
        program = ["photon", "silo", "run"] if name == "silo-1" else [f"flower-{name}"]
        command = SERVICES[name]["command"]
        assert command[: len(program)] == program
        parsed = vars(parser.parse_args(command[len(program) :]))
        assert not parsed.get("insecure")
    node = vars(supernode().parse_args(LONE_SILO["command"][3:]))
    settings = read_settings(parse_config_args([node["node_config"]]))
    assert settings.data_dir == Path("/data")
    assert settings.state_dir == Path("/state/silo")


def passed_on() -> list[re.Pattern[str]]:
    """Return the patterns of the proxy's locations that lead to the SuperLink."""
    text = re.sub(r"#.*", "", (DOCKER / "nginx.conf").read_text())
    found = []
    for kind, pattern, body in re.findall(
        r"location (=|~|) ?(\S+) \{((?:[^{}]|\{[^{}]*\})*)\}", text, re.DOTALL
    ):
        if "proxy_pass" in body:
            found.append(
                re.compile(pattern if kind == "~" else f"^{re.escape(pattern)}{'$' * (kind == '=')}")
            )
    return found


def routes() -> Iterator[str]:
    from flwr.supercore.routers.runtime.router import router as runtime
    from flwr.superlink.routers.control.router import router as control
    from flwr.superlink.routers.fleet.router import router as fleet

    for router in (runtime, control, fleet):
        yield from (route.path for route in router.routes)


def test_the_proxy_passes_on_the_fleet_api_and_nothing_else() -> None:
    patterns = passed_on()
    assert len(patterns) == 2
    known = {*routes(), "/health", "/docs", "/openapi.json", "/"}
    assert any(path.startswith("/v1/control/") for path in known)
    assert any(path.startswith("/v1/runtime/") for path in known)
    passed = {path for path in known if any(pattern.match(path) for pattern in patterns)}
    assert passed == {path for path in known if path.startswith("/v1/fleet/")} | {"/health"}
    assert len(passed) > 10


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control",
        "/v1/fleet/a/b",
        "/v1/fleet/",
        "/v1/fleetx",
    ],
)
def test_the_proxy_stops_a_path_that_leads_out_of_the_fleet_api(path: str) -> None:
    assert not any(pattern.match(path) for pattern in passed_on())


# --- images -------------------------------------------------------------------------------------------


def instructions() -> list[list[str]]:
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [line.split() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def stage(name: str) -> list[list[str]]:
    lines, current, found = instructions(), "", []
    for line in lines:
        if line[0] == "FROM":
            current = line[3]
        elif current == name:
            found.append(line)
    return found


def test_the_image_takes_nothing_from_the_build_folder_but_what_is_installed() -> None:
    copies = [line for line in stage("photon") if line[0] in {"COPY", "ADD"}]
    assert copies
    assert all(line[1] in {"--from=dependencies", "--from=build"} for line in copies)
    assert {line[2].removeprefix("/layer") for line in copies} == {"/opt/photon"}
    assert [line[1] for line in stage("proxy") if line[0] in {"COPY", "ADD"}] == ["docker/nginx.conf"]


@pytest.mark.parametrize("image", ["photon", "proxy"])
def test_an_image_runs_as_an_ordinary_user(image: str) -> None:
    users = [line[1] for line in stage(image) if line[0] == "USER"]
    assert users
    assert users[-1] not in {"0", "root"}


def test_base_images_are_arguments_with_a_version() -> None:
    lines = instructions()
    arguments = dict(line[1].split("=") for line in lines if line[0] == "ARG")
    for name in ("BASE_IMAGE", "PROXY_BASE_IMAGE"):
        _, _, tag = arguments[name].partition(":")
        assert tag
        assert "latest" not in tag
    own = {line[3] for line in lines if line[0] == "FROM"}
    assert {line[1] for line in lines if line[0] == "FROM"} - own == {"${BASE_IMAGE}", "${PROXY_BASE_IMAGE}"}


def test_the_build_folder_holds_the_package_and_no_keys_or_runs() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"]
    assert patterns[0] == "*"
    assert {line for line in patterns if line.startswith("!")} == {
        *("!photon", "!conf", "!pyproject.toml", "!constraints.txt", "!README.md", "!LICENSE"),
        *("!docker/nginx.conf", "!docker/overlay"),
    }


def test_what_a_build_needs_on_one_machine_stays_out_of_the_repository() -> None:
    for name in ("pip.conf", "ca.crt", "torch.whl"):
        done = subprocess.run(["git", "check-ignore", "-q", f"docker/overlay/{name}"], cwd=ROOT)
        assert done.returncode == 0
    done = subprocess.run(["git", "check-ignore", "-q", "docker/overlay/.gitignore"], cwd=ROOT)
    assert done.returncode == 1


def test_the_script_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    def run(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", str(DOCKER / "federation.sh"), *arguments],
            env={"PATH": path, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dirname", "sed", "id"):
        (tools / name).symlink_to(f"/usr/bin/{name}" if Path(f"/usr/bin/{name}").exists() else f"/bin/{name}")
    done = run("train", path=str(tools))
    assert done.returncode == 2
    assert re.fullmatch(r"photon: docker not found; [^\n]+\n", done.stderr)
    (tools / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tools / "docker").chmod(0o755)
    done = run("train", path=str(tools))
    assert done.returncode == 2
    assert re.fullmatch(r"photon: the Docker engine does not answer; [^\n]+\n", done.stderr)
    (tools / "docker").write_text("#!/bin/sh\nexit 0\n")
    done = run("trian", path=str(tools))
    assert done.returncode == 2
    assert re.fullmatch(r"photon: usage: [^\n]+\n", done.stderr)


#: Does in the folder what the container `prepare` would do, and nothing else.
ENGINE = """#!/bin/sh
case "$*" in
  *" prepare "*)
    while [ "$1" != prepare ]; do shift; done
    shift
    cd "$PHOTON_DEPLOYMENT" && exec "$@"
    ;;
esac
"""


@pytest.mark.slow
def test_the_commands_of_joining_make_the_keys_that_containers_are_given(tmp_path: Path) -> None:
    tools, folder = tmp_path / "bin", tmp_path / "deployment"
    tools.mkdir()
    (tools / "docker").write_text(ENGINE)
    (tools / "docker").chmod(0o755)
    (folder / "silo-1" / "data").mkdir(parents=True)
    (folder / "silo-1" / "data" / "manifest.json").write_text("{}")
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {"PHOTON_DEPLOYMENT": str(folder), "PHOTON_SILOS": "silo-1", "PHOTON_HOST": "fed.example.org"}
    script = ["/bin/bash", str(DOCKER / "federation.sh"), "up"]
    done = subprocess.run(
        script, env=os.environ | settings | {"PATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    given = [secret["file"] for secret in COMPOSE["secrets"].values()]
    given += [mount.split(":")[0] for mount in SERVICES["silo-1"]["volumes"]]
    made = {Path(one.replace("../runs/docker", str(folder))) for one in given}
    assert [path for path in made if not path.exists()] == []
    loose = [path for path in made if path.is_file() and path.stat().st_mode & 0o077]
    assert all(path.suffix == ".crt" for path in loose)
    noted = json.loads((folder / "aggregator" / "aggregator.json").read_text())
    assert noted == {"hosts": ["fed.example.org", "aggregator", "superlink"], "port": 8443, "proxy": False}
    # Called again without the host's name, it keeps what there is.
    before = {path: path.read_bytes() for path in made if path.is_file()}
    del settings["PHOTON_HOST"]
    subprocess.run(script, env=os.environ | settings | {"PATH": path}, capture_output=True, check=True)
    assert {path: path.read_bytes() for path in made if path.is_file()} == before
