#!/bin/sh
psql -c "update users set total_coins = 0 where tenant = 'old'"  # = write
psql -c 'select sum(total_coins) from orders'  # = false unknown
echo "select total_coins from users" | psql  # = read
