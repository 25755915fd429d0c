"""Flask-SQLAlchemy: db.Model, Model.query, commit decorators."""

from shop.extensions import db
from shop.models import User


class Setting(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    promo = db.Column(db.String)


def reset():
    user = User.query.filter_by(id=1).first_or_404()
    user.total_coins = 0  # = write
    for person in User.query.all():
        person.bonus = 0  # = write
    setting = Setting.query.first()
    setting.promo = "x"
    db.session.query(User.total_coins).first()  # = read
    db.session.execute("UPDATE users SET promo = 0")  # = write
