"""SQL in strings, sent by SQLAlchemy and by drivers."""

from psycopg import sql
from sqlalchemy import text

TABLE = "users"
COLUMN = "total_coins"  # = unknown
NOTE = "cannot update the total_coins and set them free"


def run(connection, cursor, user_id):
    connection.execute(text("UPDATE users SET total_coins = total_coins + :total_coins WHERE id = :id"), {"total_coins": 1})  # = write read
    connection.execute(text("update orders set total_coins = 1"))
    cursor.execute(
        """
        select o.total_coins, u.name
        from orders as o
        join users as u on u.id = o.user_id
        where u.total_coins > %s  -- = read
        """,
        (5,),
    )
    cursor.execute(f"update {TABLE} set {COLUMN} = 0 where id = {user_id}")  # = write
    cursor.execute("update %s set total_coins = 0" % TABLE)  # = write
    cursor.execute("update {} set total_coins = 0".format(TABLE))  # = write
    cursor.execute("update " + TABLE + " set total_coins = 1")  # = write
    cursor.execute(
        "insert into users (id, total_coins) "  # = write
        "values (1, 2) on conflict (id) "
        "do update set total_coins = excluded.total_coins",  # = write read
    )
    cursor.execute("select * from users")  # = read
    cursor.execute("truncate users")  # = write
    cursor.execute("delete from public.users where id = 1")  # = write
    cursor.execute("delete from archive.users where id = 1")
    cursor.execute("merge into users u using src s on s.id = u.id when matched then update set total_coins = 0")  # = write
    with cursor.copy("copy users (id, total_coins) from stdin") as copy:  # = write
        copy.write(b"")
    cursor.execute("with gone as (update users set total_coins = 0 returning id) select id from gone")  # = write
    cursor.execute(sql.SQL("update {} set {} = 0").format(sql.Identifier("users"), sql.Identifier("total_coins")))  # = unknown


def pieces(cursor, fields):
    cursor.execute("update users set " + ", ".join(f"{one} = 0" for one in fields))  # = unknown
    query = "update users "
    query += "set total_coins = 0"  # = missed write
    cursor.execute(query)


def rows(cursor):
    for row in cursor.execute("select id, total_coins from users"):  # = read
        print(row["total_coins"])  # = unknown
