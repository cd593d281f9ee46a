"""What can go wrong between these scripts and a finished workflow, as sentences for the user."""

from __future__ import annotations


class ComfyUIError(Exception):
    """ComfyUI cannot be found, started or reached; the message is one sentence for the user."""


class PromptRefused(Exception):
    """The server refused a workflow. `errors` is its response: {"error": {...}, "node_errors": {...}}."""

    def __init__(self, errors: dict):
        super().__init__(describe_refusal(errors))
        self.errors = errors


class PromptFailed(Exception):
    """A workflow was accepted but did not finish."""


FAILURES = (ComfyUIError, PromptRefused, PromptFailed)
"""Everything that can prevent a workflow from finishing; each message is a sentence for the user."""


def describe_refusal(errors: dict) -> str:
    """One sentence from the server's response to an invalid workflow."""
    reasons = [
        f"node {node} ({report.get('class_type', 'unknown')}): {reason_text(reason)}"
        for node, report in (errors.get("node_errors") or {}).items()
        for reason in report.get("errors", [])
    ]
    error = errors.get("error") or {}
    reasons = reasons or [reason_text(error) if isinstance(error, dict) else str(error)]
    return "ComfyUI refused the workflow: " + "; ".join(dict.fromkeys(reasons))


def reason_text(reason: dict) -> str:
    message, details = (one_line(reason.get(key)) for key in ("message", "details"))
    return f"{message}: {details}" if message and details else message or details or "no reason given"


def one_line(text: object) -> str:
    return " ".join(str(text or "").split())


def describe_failure(messages: list) -> str:
    """One sentence from the status messages of a prompt that did not succeed."""
    for kind, data in reversed(messages):
        where = f"node {data.get('node_id')} ({data.get('node_type')})"
        if kind == "execution_error":
            return f"The workflow failed at {where}: {one_line(data.get('exception_message')) or 'no message'}"
        if kind == "execution_interrupted":
            return f"The workflow was interrupted at {where}."
    return "The workflow failed and ComfyUI gave no reason."
