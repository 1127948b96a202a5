"""The client: sessions with shards, tables as flat memory, tickets."""

from headwater.client.client import Client, ClientStatistics
from headwater.client.connect import connect, current
from headwater.client.dense import Dense
from headwater.client.table import Table
from headwater.client.tickets import StepResult, Ticket

__all__ = ["Client", "ClientStatistics", "Dense", "StepResult", "Table", "Ticket", "connect", "current"]
