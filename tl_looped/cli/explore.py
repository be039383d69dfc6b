"""`tl-looped explore`: a page of this machine on which a model is asked, loop by loop."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import LoopedError
from ._devices import add_devices, devices
from ._parser import add_command

if TYPE_CHECKING:
    from ._parser import Commands

EXAMPLE = 'tl-looped explore toy:hop --prompt "A b B c C d D a ? A"'


def add(commands: Commands) -> None:
    """Declare the command."""
    help = "a page to ask a model with the mouse: every loop, layer and position, patches, interventions"
    parser = add_command(commands, "explore", run, help, EXAMPLE)
    parser.add_argument("checkpoint", metavar="MODEL", help="a Hub id, a directory with config.json and tensors, or a toy")
    parser.add_argument("--prompt", metavar="TEXT", help="the first prompt; where there is no tokenizer, ids such as 5,17,3")
    parser.add_argument("--other", metavar="TEXT", help="the second prompt, whose activations can be put into the first")
    parser.add_argument(
        "--n-loops", metavar="N", type=int, help="how often to loop at first (default: what the checkpoint says)"
    )
    parser.add_argument("--port", type=int, default=0, help="of 127.0.0.1 (default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open nothing")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_devices(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    from ..explorer.server import listening, need_server, serve

    need_server()
    listening(args.port).close()  # before the model is loaded, which takes longer
    import json
    import webbrowser
    from urllib.parse import quote

    from ..bridge.looped_bridge import LoopedBridge
    from ..explorer import Session

    model = LoopedBridge.from_pretrained(args.checkpoint, revision=args.revision, **devices(args))
    session = Session(model)
    state = {"prompt": args.prompt, "other": args.other, "loops": args.n_loops}
    state = {name: value for name, value in state.items() if value is not None}
    if args.prompt is not None and (error := session.answer({"ask": "script", "state": state}).get("error")):
        raise LoopedError(error)

    def ready(address: str) -> None:
        shown = address + (f"#{quote(json.dumps(state))}" if state else "")
        print(f"{shown}\nCtrl-C ends it.", flush=True)
        if not args.no_browser:
            webbrowser.open(shown)

    serve(session, args.port, ready)
    return 0
