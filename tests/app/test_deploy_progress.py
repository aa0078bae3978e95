"""Messages of Serve's own status objects, as Serve 2.60 fills them."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.common import DeploymentStatusTrigger
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus

from app.deploy_progress import DeployFailedError, all_running, last_error, what_is_missing

# What Serve says of a replica whose checkpoint is not there (colours, actor and pid included).
TRACE = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
\x1b[36mray::ServeReplica:app:demo.initialize_and_get_metadata()\x1b[39m (pid=9, ip=192.0.2.2, repr=<replica>)
  File "/python/concurrent/futures/_base.py", line 401, in __get_result
    raise self._exception
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
RuntimeError: Traceback (most recent call last):
  File "/site/app/replica.py", line 80, in __init__
    translator = self._load(checkpoint, config)
                 ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/site/engine/tokenizer.py", line 115, in _read_json
    raise TokenizerError(f"{path} does not exist") from None
engine.tokenizer.TokenizerError: /nope/tokenizer_config.json does not exist; a checkpoint needs
both of its files"""


def status(application: str, **deployments: tuple[str, str]) -> ServeStatus:
    found: dict[str, Any] = {
        name: DeploymentStatusOverview(
            status=state, status_trigger=DeploymentStatusTrigger.UNSPECIFIED, replica_states={}, message=message
        )
        for name, (state, message) in deployments.items()
    }
    overview = ApplicationStatusOverview(
        status=application, message="Failed to update the deployments.", last_deployed_time_s=0, deployments=found
    )
    return ServeStatus(applications={"app": overview})


def test_a_failed_start_names_the_pool_and_the_error_alone() -> None:
    failed = status("DEPLOY_FAILED", ingress=("HEALTHY", ""), demo=("DEPLOY_FAILED", TRACE))
    with pytest.raises(DeployFailedError) as caught:
        all_running(failed)
    assert str(caught.value) == (
        "application app failed: demo: TokenizerError: /nope/tokenizer_config.json does not exist; a checkpoint needs\n"
        "both of its files"
    )


def test_a_failure_of_the_whole_application_is_told_in_its_own_words() -> None:
    with pytest.raises(DeployFailedError, match="application app failed: Failed to update the deployments"):
        all_running(status("DEPLOY_FAILED"))


def test_running_is_running_and_nothing_deployed_is_not() -> None:
    assert all_running(status("RUNNING", demo=("HEALTHY", "")))
    assert not all_running(status("DEPLOYING", demo=("UPDATING", "")))
    assert not all_running(ServeStatus())


def test_what_is_missing_leaves_out_what_is_healthy() -> None:
    waiting = status("DEPLOYING", ingress=("HEALTHY", ""), demo=("UPDATING", "no node has a GPU"), other=("UPDATING", ""))
    assert what_is_missing(waiting) == "demo: no node has a GPU; other: UPDATING"


@pytest.mark.parametrize("message", ["", "no trace here", "File a bug", "  two\n  lines"])
def test_messages_without_a_trace_stay(message: str) -> None:
    assert last_error(message) == message.strip()


def test_an_error_without_a_message_is_still_named() -> None:
    assert last_error('Traceback:\n  File "a.py", line 1, in f\n    raise KeyError\nKeyError') == "KeyError"
