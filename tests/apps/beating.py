"""A process of an application that lives: it beats by the flag file that it is given, until its stdin ends.

Arguments: the configuration, the flag file. It says ``beats`` when it has beaten for the first time.
"""

import sys

from walletmigrate import Settings
from walletmigrate.flag_sources import FileSource
from walletmigrate.heartbeat import Heartbeat

settings = Settings.load(sys.argv[1])
heartbeat = Heartbeat(settings, FileSource(sys.argv[2]), name="shop", seconds=1.0)
heartbeat.beat()
heartbeat.start()
print("beats", flush=True)
sys.stdin.read()
