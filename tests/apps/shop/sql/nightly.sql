-- Interest, every night. Once it read: update users set total_coins = 0
update users as u
set promo = 0,  -- = write
    total_coins = u.total_coins * 1.01  -- = write read
from tenants as t
where t.name = u.tenant and t.promo > 0;

update accounts set total_coins = 1, promo = 2;

create or replace function pay(bigint, numeric) returns void language sql as $$
    update public.users set total_coins = total_coins + $2 where id = $1  -- = write read
$$;

create view rich as
select id, total_coins  -- = read
from users;

insert into users values (1, 'x', 5);  -- = write
update orders set note = 'update users set total_coins = 0';  -- = false write
-- walletmigrate: ignore once, before the ledger was opened
update users set total_coins = 7;  -- = accepted
